#!/usr/bin/env bash
# Checks deploy/ and docker-compose.yml without Docker and without a cluster: the Dockerfile by hadolint, the compose file by
# its schema, the build context by what cargo needs, the rendered manifests by manifests.py. What they set is held against
# the programs' configuration by tests/tests/deploy.rs.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

install() { apt-get update -qq && apt-get install -y -qq "$@" >/dev/null; }

command -v kubectl >/dev/null || install kubernetes-client
python3 -m venv "$work/venv" 2>/dev/null || { install python3-venv && python3 -m venv --clear "$work/venv"; }
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/deploy/requirements.txt
export PATH="$work/venv/bin:$PATH"

hadolint deploy/docker/Dockerfile
echo "Dockerfile: hadolint finds nothing"

check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml
echo "docker-compose.yml: as its schema wants it"

python tests/deploy/context.py "$work/context"
cargo metadata --no-deps --offline --format-version 1 --manifest-path "$work/context/Cargo.toml" >/dev/null
echo "build context: holds the whole workspace"

for kustomization in base overlays/cpu overlays/gpu; do
  if ! kubectl kustomize "deploy/kubernetes/$kustomization" >"$work/${kustomization##*/}.yaml"; then
    echo "kubectl 1.27 or newer is needed; here is: $(kubectl version --client 2>&1 | head -1)" >&2
    exit 1
  fi
done
python tests/deploy/manifests.py "$work/base.yaml" "$work/cpu.yaml" "$work/gpu.yaml"
