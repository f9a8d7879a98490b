#!/bin/sh
# Builds build/adapters/quic-go/{server,vectors}; exits with 3, and says what is missing, where there is no toolchain.
set -eu
cd "$(dirname "$0")"
out=../../../build/adapters/quic-go

if [ -x "$out/server" ] && [ -x "$out/vectors" ] &&
    [ -z "$(find . -type f -newer "$out/server")" ]; then
    exit 0
fi
command -v go >/dev/null || {
    echo "no go"
    exit 3
}
mkdir -p "$out"
go build -trimpath -ldflags='-s -w' -o "$out/vectors" ./cmd/vectors
go build -trimpath -ldflags='-s -w' -o "$out/server" ./cmd/server
