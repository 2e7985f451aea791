#!/usr/bin/env bash
# Is what would be published whole? The wheel is installed where nothing but the small packages is, then converts a model
# to Megatron and back: `bash examples/check_wheel.sh dist`. The sdist must hold what its own tests need.
set -euo pipefail
dist=$(cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

wheel=("$dist"/*.whl) sdist=("$dist"/*.tar.gz)
[ ${#wheel[@]} = 1 ] && [ ${#sdist[@]} = 1 ] || { echo "expected one wheel and one sdist in $dist" >&2; exit 1; }

python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'numpy>=1.26' 'pyyaml>=6.0' 'rich>=13.9' 'typer>=0.20'
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "${wheel[0]}"

mkdir "$work/sdist"
tar -xzf "${sdist[0]}" -C "$work/sdist" --strip-components 1
for file in README.md LICENSE CHANGELOG.md SECURITY.md Makefile docs/start.md tests/test_documents.py fixtures/damaged/hf/config.json; do
  [ -f "$work/sdist/$file" ] || { echo "the sdist lacks $file" >&2; exit 1; }
done

cd "$work"
unset PYTHONPATH
ckptkit=$work/venv/bin/ckptkit
model=$work/sdist/fixtures/damaged/hf
"$ckptkit" --version
"$ckptkit" doctor --for weights > /dev/null
"$ckptkit" convert "$model" there --to torch --tp 2 > /dev/null
"$ckptkit" convert there back --to hf > /dev/null
"$ckptkit" verify "$model" there --level weights > /dev/null
diff -r "$model" back
echo "the wheel converts, verifies, and gives back identical files"
