#!/bin/sh
# Builds build/adapters/quiche/server and vectors. Exits with 3 if Node, npm, its registry or a prebuilt binding is
# missing.
set -eu
cd "$(dirname "$0")"
out=../../../build/adapters/quiche
sources="build.sh package.json package-lock.json quiclb.mjs h3.mjs tokens.mjs server.mjs vectors.mjs"

command -v node >/dev/null || { echo "no node"; exit 3; }
command -v npm >/dev/null || { echo "no npm"; exit 3; }
node -e 'process.exit(parseInt(process.versions.node) >= 20 ? 0 : 1)' || { echo "node 20 or newer is needed"; exit 3; }
[ "$(node -p 'process.platform + process.arch')" = linuxx64 ] || { echo "no prebuilt quiche for $(uname -sm)"; exit 3; }

mkdir -p "$out"
# shellcheck disable=SC2086 # words, each of them
if [ -x "$out/server" ] && [ -x "$out/vectors" ] && [ -z "$(find $sources -newer "$out/vectors")" ]; then
    exit 0
fi

# shellcheck disable=SC2086
cp $sources "$out/"
cd "$out"
if ! npm ci --ignore-scripts --no-fund --no-audit >npm.log 2>&1; then
    if grep -Eq 'ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT|ENETUNREACH' npm.log; then
        echo "no way to npm's registry"
        exit 3
    fi
    cat npm.log
    exit 1
fi
for program in server vectors; do
    cat >"$program" <<EOF
#!/bin/sh
exec node "\$(dirname "\$0")/$program.mjs" "\$@"
EOF
    chmod +x "$program"
done
