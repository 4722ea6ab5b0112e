# Stage one compiles the wheel; stage two has no compiler and runs as a numeric user.
ARG PYTHON=3.13-slim-bookworm

FROM python:${PYTHON} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY tradecore tradecore
COPY sql sql
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="tradecore" \
      org.opencontainers.image.description="Exact, gap-proof recorder of Binance Spot market data" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-index --find-links /wheels tradecore \
    && rm -rf /wheels \
    && mkdir /data \
    && chown 10001:10001 /data
USER 10001:10001
ENV DATA_DIR=/data \
    LOG_FORMAT=json \
    PYTHONDONTWRITEBYTECODE=1
VOLUME /data
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s CMD ["tradecore", "health"]
ENTRYPOINT ["tradecore"]
CMD ["run"]
