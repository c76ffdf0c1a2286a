# shellcheck shell=bash
# Sourced by the scripts that run programs built for CUDA. Defines `find_libraries`.

# find_libraries PROGRAM [PYTHON]
#
# Extends LD_LIBRARY_PATH if PROGRAM cannot load its libraries without it. Only directories that
# have a missing library are added. They are searched for in NVIDIA's Python packages, which PyTorch
# depends on, and where container runtimes and CUDA's installer put libraries. The loader searches
# LD_LIBRARY_PATH before its default directories, so other libraries in the added directories take
# precedence too. Returns 1 if a library is still missing; stderr names the missing ones.
find_libraries() {
  local program=$1 python=${2:-python3} directories directory library missing added=1
  missing=$(missing_libraries "$program")
  [ -n "$missing" ] || return 0
  directories=$("$python" -c '
import glob, importlib.util
package = importlib.util.find_spec("nvidia")
roots = list(package.submodule_search_locations) if package else []
found = [path for root in roots for path in sorted(glob.glob(root + "/*/lib"))]
print(*found, "/usr/local/nvidia/lib64", "/usr/local/cuda/lib64", sep="\n")
' 2>/dev/null || true)
  # A library that was found may need other libraries.
  while [ -n "$missing" ] && [ -n "$added" ]; do
    added=''
    for library in $missing; do
      while IFS= read -r directory; do
        if [ -e "$directory/$library" ] && [[ ":${LD_LIBRARY_PATH:-}:" != *":$directory:"* ]]; then
          added=1
          export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$directory"
          break
        fi
      done <<<"$directories"
    done
    missing=$(missing_libraries "$program")
  done
  [ -n "$missing" ] || return 0
  echo "$program needs libraries that are not installed: $missing" >&2
  echo "searched: the default directories, ${LD_LIBRARY_PATH:-and LD_LIBRARY_PATH, which is empty}" >&2
  echo "loractl doctor names the packages that have them" >&2
  return 1
}

# Prints the libraries of program "$1" that the loader does not find, on one line.
missing_libraries() {
  ldd "$1" | awk '/not found/ { print $1 }' | sort -u | paste -sd ' '
}
