#!/bin/sh
# Builds build/adapters/ngtcp2/server and vectors, and server-checked, the same under sanitizers, for the tests.
# Exits with 3 if a library or the compiler is missing.
set -eu
cd "$(dirname "$0")"
out=../../../build/adapters/ngtcp2

command -v cc >/dev/null || { echo "no C compiler"; exit 3; }
command -v pkg-config >/dev/null || { echo "no pkg-config"; exit 3; }
for library in libngtcp2 libngtcp2_crypto_gnutls libnghttp3 gnutls nettle yaml-0.1; do
    pkg-config --exists "$library" || { echo "no $library: docs/servers/ngtcp2.md says what to install"; exit 3; }
done
case $(pkg-config --modversion libngtcp2) in
0.12.*) ;;
*) echo "written for libngtcp2 0.12, and this is $(pkg-config --modversion libngtcp2)"; exit 3 ;;
esac

mkdir -p "$out"
if [ -x "$out/server" ] && [ -x "$out/vectors" ] &&
    [ -z "$(find quiclb.h quiclb.c server.c vectors.c build.sh -newer "$out/vectors")" ]; then
    exit 0
fi

flags="-std=c17 -Wall -Wextra -Werror -g -fstack-protector-strong"
checks="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
all=$(pkg-config --cflags --libs libngtcp2_crypto_gnutls libngtcp2 libnghttp3 gnutls nettle yaml-0.1)
few=$(pkg-config --cflags --libs nettle yaml-0.1)
# shellcheck disable=SC2086 # words, each of them
cc $flags -O2 -D_FORTIFY_SOURCE=2 -o "$out/server.new" server.c quiclb.c -pthread $all
# shellcheck disable=SC2086
cc $flags $checks -o "$out/server-checked.new" server.c quiclb.c -pthread $all
# shellcheck disable=SC2086
cc $flags $checks -o "$out/vectors.new" vectors.c quiclb.c -pthread $few
for program in server server-checked vectors; do
    mv "$out/$program.new" "$out/$program"
done
