"""Moving bytes: plans, the engine that carries them out, and the commit."""
