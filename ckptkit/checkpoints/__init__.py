"""Any format to the canonical view: locate, recognise, describe, join."""
