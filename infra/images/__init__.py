"""Container images: `builder` builds one from its Dockerfile, `inside` runs in the build, `contents` reads what came of it."""
