#!/usr/bin/env bash
# Checks deploy/ and docker-compose.yml without Docker and without a cluster: the Dockerfile with
# hadolint, the compose file with its schema, the build context with cargo, and the rendered
# manifests with manifests.py. tests/tests/deploy compares their settings with the programs'.
#
#   tests/deploy/check.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
# The copy of the build context must not stay: while it exists, cargo takes packages that were built
# from the copy for packages of this directory.
trap 'rm -rf "$work" "$target/deploy-context"' EXIT

install() { apt-get update -qq && apt-get install -y -qq "$@" >/dev/null; }

command -v kubectl >/dev/null || install kubernetes-client
python3 -m venv "$work/venv" 2>/dev/null || { install python3-venv && python3 -m venv --clear "$work/venv"; }
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/deploy/requirements.txt
export PATH="$work/venv/bin:$PATH"

hadolint deploy/docker/Dockerfile
echo "Dockerfile: hadolint reports no problems"

check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml
echo "docker-compose.yml: matches its schema"

# The copy is in the target directory, always at the same path, so that cargo does not build
# packages again.
rm -rf "$target/deploy-context"
python tests/deploy/context.py "$target/deploy-context"
CARGO_TARGET_DIR=$target cargo check --quiet --locked --workspace --bins \
  --manifest-path "$target/deploy-context/Cargo.toml"
echo "build context: contains all sources of the programs"

for kustomization in base overlays/cpu overlays/gpu; do
  if ! kubectl kustomize "deploy/kubernetes/$kustomization" >"$work/${kustomization##*/}.yaml"; then
    echo "invalid kubectl: $(kubectl version --client 2>&1 | head -1); it must be 1.27 or newer" >&2
    exit 1
  fi
done
python tests/deploy/manifests.py "$work/base.yaml" "$work/cpu.yaml" "$work/gpu.yaml"
