"""The main job: any checkpoint to any format and grid, as a plan of byte copies."""
