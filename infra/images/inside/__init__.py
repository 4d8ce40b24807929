"""What runs inside an image's build: the standard library alone, by the Python of the base image."""
