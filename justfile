# The recipes of this repository. `just` lists them, `just ci` runs everything that CI checks.
# Install just with `cargo install just`, or from PyPI with `pip install rust-just`.

set shell := ["bash", "-euo", "pipefail", "-c"]

export PYTHONDONTWRITEBYTECODE := "1"

# List the recipes.
default:
    @just --list

# Format the Rust code.
fmt:
    cargo fmt --all

# Check the format, the width of lines, and lints.
lint:
    cargo fmt --all --check
    python3 tests/width.py
    cargo clippy --workspace --all-targets -- -D warnings

# Run all tests.
test:
    cargo test --workspace

# Run the end-to-end tests, with real coordinator and worker processes.
e2e:
    cargo test -p lora-e2e

# Check the documents against the programs, and build the API documentation.
docs:
    cargo test -p lora-e2e --test docs
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

# Check a running service with a gRPC client in Python.
clients:
    tests/clients/python/check.sh

# Check the container images, the compose file and the manifests.
deploy:
    tests/deploy/check.sh

# Check licences, advisories, duplicate versions and sources of the dependencies.
deny:
    tests/deny.sh

# Train the example and check its accuracy and its receipt.
quickstart:
    tests/quickstart.sh

# Build the Python wheel, and run the program from it.
wheel:
    tests/wheel.sh

# Test the scripts of the GPU kit and the tables of its results.
gpu-kit:
    for tests in tests/gpu/onsite/{tests,process_tests,script_tests}.py benches/gpu/tests.py; do \
        python3 "$tests"; \
    done
    python3 benches/gpu/results.py --check

# Build the CUDA programs and run all checks on the simulated GPU. Skipped without CUDA's compiler.
gpu-sim:
    tests/gpu/simulated.sh || { \
        status=$?; \
        [ $status = 75 ] || exit $status; \
        echo "SKIPPED: CUDA's compiler cannot be installed on this machine"; \
    }

# Measure a training step on the CPU, and the same step by PEFT.
bench:
    benches/cpu/run.sh

# Everything that CI checks.
ci: lint deny test clients gpu-kit deploy quickstart wheel gpu-sim
