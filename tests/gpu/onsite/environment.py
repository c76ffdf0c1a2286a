"""Prints a line of JSON about this machine: GPU, driver, libraries, packages, processor, tools."""

import ctypes
import glob
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess

NVIDIA_SMI = [
    "name", "driver_version", "memory.total", "memory.used", "power.limit", "clocks.sm", "clocks.max.sm",
    "clocks.mem", "mig.mode.current", "compute_mode", "temperature.gpu", "uuid",
]  # fmt: skip
# Numbers of CU_DEVICE_ATTRIBUTE_*.
ATTRIBUTES = {
    "clock_rate_khz": 13,
    "multiprocessors": 16,
    "integrated": 18,
    "memory_clock_rate_khz": 36,
    "memory_bus_bits": 37,
    "l2_bytes": 38,
    "compute_capability_major": 75,
    "compute_capability_minor": 76,
    "shared_memory_of_a_multiprocessor_bytes": 81,
    "managed_memory": 83,
    "pageable_memory_access": 88,
    "concurrent_managed_access": 89,
    "shared_memory_of_a_block_opt_in_bytes": 97,
    "host_register_supported": 99,
    "pageable_memory_access_uses_host_page_tables": 100,
    "virtual_memory_management_supported": 102,
    "memory_pools_supported": 115,
}
PACKAGES = [
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "nvidia-cublas",
    "nvidia-cuda-runtime", "nvidia-curand", "nvidia-nccl-cu13", "nvidia-cudnn-cu13",
]  # fmt: skip
# Seconds that nvidia-smi may take.
SMI_SECONDS = 5
# Environment variables that change results or speed.
VARIABLES = ("CUDA_", "CUBLAS", "NCCL_", "NVIDIA_", "LORA_", "PYTORCH_")


def main() -> None:
    driver = device()
    smi = nvidia_smi()
    described = {
        "card": driver.get("name") or (smi or {}).get("name"),
        "driver": (smi or {}).get("driver_version") or kernel_module(),
        "device": driver,
        "nvidia_smi": smi,
        "libraries": libraries(),
        "packages": {name: version for name in PACKAGES if (version := package(name))},
        "processor": processor(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "tools": {name: path for name in ("ncu", "compute-sanitizer", "nvcc") if (path := tool(name))},
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
    }
    # The JSON starts on a new line, because loaded libraries may have written to stdout.
    print("\n" + json.dumps(described), flush=True)


def device() -> dict:
    """Properties of the first GPU from the driver's library, or `error`."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"error": str(error)}
    for name, arguments in {
        "cuInit": (0,),
        "cuDeviceGet": (ctypes.byref(ordinal := ctypes.c_int()), 0),
    }.items():
        if status := getattr(cuda, name)(*arguments):
            return {"error": f"{name} returned {status}"}
    count, version, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetName(name, len(name), ordinal)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), ordinal)
    described = {
        "name": name.value.decode(),
        "count": count.value,
        "cuda": version.value,
        "memory_bytes": memory.value,
    }
    for attribute, number in ATTRIBUTES.items():
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, ordinal) == 0:
            described[attribute] = value.value
    return described


def nvidia_smi() -> dict | None:
    """Properties of the first GPU from nvidia-smi, or `error`; None if it is not installed."""
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader", "--id=0"]
    try:
        smi = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        answer, _ = smi.communicate(timeout=SMI_SECONDS)
    except FileNotFoundError:
        return None
    except OSError as error:
        return {"error": str(error)}
    except subprocess.TimeoutExpired:
        # This process does not wait for nvidia-smi, which may hang in the kernel.
        smi.kill()
        return {"error": f"no answer in {SMI_SECONDS} s"}
    first = answer.strip().partition("\n")[0]
    if smi.returncode != 0:
        return {"error": f"exit status {smi.returncode}: {first[:200]}"}
    return dict(zip(NVIDIA_SMI, (value.strip() for value in first.split(",")), strict=False))


def kernel_module() -> str | None:
    try:
        with open("/sys/module/nvidia/version") as file:
            return file.read().strip()
    except OSError:
        return None


def libraries() -> dict[str, str]:
    """Versions of the libraries that the programs load, or the loader's error."""
    versions = {}
    for file, function in {
        "libcudart.so.13": "cudaRuntimeGetVersion",
        "libnccl.so.2": "ncclGetVersion",
    }.items():
        try:
            value = ctypes.c_int()
            getattr(ctypes.CDLL(file), function)(ctypes.byref(value))
            versions[file] = str(value.value)
        except (OSError, AttributeError) as error:
            versions[file] = str(error)
    for file, function in {
        "libcublas.so.13": "cublasGetProperty",
        "libcurand.so.10": "curandGetProperty",
    }.items():
        try:
            read, parts = getattr(ctypes.CDLL(file), function), [ctypes.c_int() for _ in range(3)]
            failed = any(read(part, ctypes.byref(value)) for part, value in enumerate(parts))
            versions[file] = "unknown" if failed else ".".join(str(value.value) for value in parts)
        except (OSError, AttributeError) as error:
            versions[file] = str(error)
    return versions


def package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        return next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine()
        )


def tool(name: str) -> str | None:
    """The path of a tool on PATH, or where CUDA's installers put it."""
    installed = glob.glob(f"/usr/local/cuda/bin/{name}") + sorted(glob.glob(f"/opt/nvidia/*/*/{name}"))
    return shutil.which(name) or next(iter(installed), None)


if __name__ == "__main__":
    main()
