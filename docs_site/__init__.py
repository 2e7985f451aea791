"""What makes the documentation site: generated pages, and the picture of the demo."""
