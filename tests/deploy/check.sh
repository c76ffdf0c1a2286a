#!/usr/bin/env bash
# Checks deploy/ and docker-compose.yml without Docker and without a cluster: the Dockerfile by hadolint, the compose file by
# its schema, the build context by cargo, the rendered manifests by manifests.py. What they set is held against the programs'
# configuration by tests/tests/deploy.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
# What is built from the copy of the context passes for what is built from here, until cargo finds the copy gone.
trap 'rm -rf "$work" "$target/deploy-context"' EXIT

install() { apt-get update -qq && apt-get install -y -qq "$@" >/dev/null; }

command -v kubectl >/dev/null || install kubernetes-client
python3 -m venv "$work/venv" 2>/dev/null || { install python3-venv && python3 -m venv --clear "$work/venv"; }
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/deploy/requirements.txt
export PATH="$work/venv/bin:$PATH"

hadolint deploy/docker/Dockerfile
echo "Dockerfile: hadolint finds nothing"

check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml
echo "docker-compose.yml: as its schema wants it"

# Under the target directory, where nothing that is built already is built again, and always in the same place.
rm -rf "$target/deploy-context"
python tests/deploy/context.py "$target/deploy-context"
CARGO_TARGET_DIR=$target cargo check --quiet --locked --workspace --bins --manifest-path "$target/deploy-context/Cargo.toml"
echo "build context: holds all that the programs are built from"

for kustomization in base overlays/cpu overlays/gpu; do
  if ! kubectl kustomize "deploy/kubernetes/$kustomization" >"$work/${kustomization##*/}.yaml"; then
    echo "kubectl 1.27 or newer is needed; here is: $(kubectl version --client 2>&1 | head -1)" >&2
    exit 1
  fi
done
python tests/deploy/manifests.py "$work/base.yaml" "$work/cpu.yaml" "$work/gpu.yaml"
