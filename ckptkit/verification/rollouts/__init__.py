"""`verify --rollouts`: what an inference engine recorded, against the model that is trained."""
