#!/bin/sh
# Builds build/adapters/quinn/{server,vectors}; exits with 3, and says what is missing, where there is no toolchain.
set -eu
cd "$(dirname "$0")"
out=../../../build/adapters/quinn

if [ -x "$out/server" ] && [ -x "$out/vectors" ] &&
    [ -z "$(find . -type f -newer "$out/server")" ]; then
    exit 0
fi
command -v cargo >/dev/null || {
    echo "no cargo"
    exit 3
}
mkdir -p "$out"
cargo build --locked --quiet --release --target-dir "$out/target"
cargo test --locked --quiet --release --target-dir "$out/target" --no-run # so that tests do not wait for it
cp "$out/target/release/vectors" "$out/vectors"
cp "$out/target/release/server" "$out/server"
