"""Container images: `builder` builds one from its Dockerfile, `inside` is what runs in the build."""
