# shellcheck shell=bash
# Sourced by the scripts that run programs built for CUDA. Defines `find_libraries`.

# find_libraries PROGRAM [PYTHON]
#
# Extends LD_LIBRARY_PATH if PROGRAM cannot load its libraries without it: with the directories of
# NVIDIA's Python packages, which PyTorch depends on, and with those where container runtimes and
# CUDA's installer put libraries. What the loader finds by itself comes first. Returns 1 if a
# library is still missing; stderr names the missing ones.
find_libraries() {
  local program=$1 python=${2:-python3} found missing
  missing=$(missing_libraries "$program")
  [ -n "$missing" ] || return 0
  found=$("$python" -c '
import glob, importlib.util
package = importlib.util.find_spec("nvidia")
roots = list(package.submodule_search_locations) if package else []
places = [place for root in roots for place in sorted(glob.glob(root + "/*/lib"))]
print(":".join(places + glob.glob("/usr/local/nvidia/lib64") + glob.glob("/usr/local/cuda/lib64")))
' 2>/dev/null || true)
  if [ -n "$found" ]; then export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$found"; fi
  missing=$(missing_libraries "$program")
  [ -n "$missing" ] || return 0
  echo "$program needs libraries that are not installed: $missing" >&2
  echo "searched: the default directories, ${LD_LIBRARY_PATH:-and LD_LIBRARY_PATH, which is empty}" >&2
  return 1
}

# The libraries of program "$1" that the loader does not find, on one line.
missing_libraries() {
  ldd "$1" | awk '/not found/ { print $1 }' | sort -u | paste -sd ' '
}
