# tradecore as an image: stage one compiles the wheel, stage two has no compiler.
#
#   docker build --tag tradecore .
#   docker run --detach --name tradecore --read-only --cap-drop all \
#       --security-opt no-new-privileges --memory 160m --pids-limit 64 --stop-timeout 60 \
#       --volume tradecore:/data --publish 127.0.0.1:3000:3000 \
#       --volume "$PWD/database_url:/run/secrets/database_url:ro" \
#       --env DATABASE_URL_FILE=/run/secrets/database_url tradecore
#
# Without HTTP_TOKEN_FILE, probes and /metrics are all that answers. compose.yaml has the database
# and all the rest beside it. Add @sha256:... to PYTHON to pin the base by its content.
ARG PYTHON=3.13-slim-trixie

FROM python:${PYTHON} AS build
# A version of the compiler would be gone from the mirrors within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# Everything that comes from outside is a wheel whose hash is known here. /opt/build only builds.
COPY requirements requirements
RUN for venv in build tradecore; do \
        python -m venv --without-pip "/opt/$venv" \
        && pip --python "/opt/$venv" install --require-hashes --no-deps --only-binary :all: \
            --requirement "requirements/$venv.txt" || exit 1; \
    done \
    && find /opt/tradecore -type d -name tests -prune -exec rm -r {} +
# The slow step by itself: it is repeated only when what is compiled has changed.
COPY setup.py ./
COPY tradecore/__init__.py tradecore/*.pxd tradecore/*.pyx tradecore/
COPY tradecore/feed/*.pxd tradecore/feed/*.pyx tradecore/feed/
RUN /opt/build/bin/python setup.py --quiet build_ext
COPY pyproject.toml README.md LICENSE ./
COPY sql sql
COPY tradecore tradecore
RUN pip --python /opt/build wheel --no-build-isolation --no-deps --wheel-dir /wheels . \
    && pip --python /opt/tradecore install --no-index --no-deps /wheels/*.whl

FROM python:${PYTHON}
ARG VERSION=0.1.0
ARG SOURCE=
ARG REVISION=
LABEL org.opencontainers.image.title="tradecore" \
      org.opencontainers.image.description="Exact, gap-proof recorder of Binance Spot market data into TimescaleDB" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/tradecore /opt/tradecore
ENV PATH=/opt/tradecore/bin:$PATH
# The base has no bytecode of the standard library, and a read-only root lets nobody write it later:
# what the daemon imports is compiled now. The volume takes its owner from the folder.
RUN python -c "import tradecore.supervisor, tradecore.check, tradecore.simulate.__main__" \
    && groupadd --gid 10001 tradecore \
    && useradd --uid 10001 --gid 10001 --home-dir /data --shell /usr/sbin/nologin tradecore \
    && install --directory --mode 0700 --owner 10001 --group 10001 /data
ENV DATA_DIR=/data \
    HTTP_HOST=0.0.0.0 \
    LOG_FORMAT=json \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME /data
EXPOSE 3000
STOPSIGNAL SIGTERM
# To be looked at. What restarts a container has to ask for less, tradecore health --live: a database
# that is away is mended by no restart.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s CMD ["tradecore", "health"]
ENTRYPOINT ["tradecore"]
CMD ["run"]
