//! CUDA's libraries: which there are, which version, and where.

use std::error::Error;
use std::ffi::c_int;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

/// Those that a worker built for CUDA loads, and those that are good to know of.
pub(crate) const LIBRARIES: [Library; 7] = [
    Library {
        name: "CUDA runtime",
        file: "libcudart.so.13",
        needed: true,
        package: "cuda-cudart-13-0",
        wheel: "nvidia-cuda-runtime==13.0.*",
        version: VersionQuery::Number("cudaRuntimeGetVersion", [1000, 10, 0]),
    },
    Library {
        name: "cuBLAS",
        file: "libcublas.so.13",
        needed: true,
        package: "libcublas-13-0",
        wheel: "nvidia-cublas==13.*",
        version: VersionQuery::Property("cublasGetProperty"),
    },
    Library {
        name: "cuBLASLt",
        file: "libcublasLt.so.13",
        needed: true,
        package: "libcublas-13-0",
        wheel: "nvidia-cublas==13.*",
        version: VersionQuery::Property("cublasLtGetProperty"),
    },
    Library {
        name: "cuRAND",
        file: "libcurand.so.10",
        needed: true,
        package: "libcurand-13-0",
        wheel: "nvidia-curand==10.4.*",
        version: VersionQuery::Property("curandGetProperty"),
    },
    Library {
        name: "NVRTC",
        file: "libnvrtc.so.13",
        needed: false,
        package: "cuda-nvrtc-13-0",
        wheel: "nvidia-cuda-nvrtc==13.0.*",
        version: VersionQuery::Pair("nvrtcVersion"),
    },
    Library {
        name: "NCCL",
        file: "libnccl.so.2",
        needed: true,
        package: "libnccl2",
        wheel: "nvidia-nccl-cu13",
        version: VersionQuery::Number("ncclGetVersion", [10_000, 100, 1]),
    },
    Library {
        name: "cuDNN",
        file: "libcudnn.so.9",
        needed: false,
        package: "libcudnn9-cuda-13",
        wheel: "nvidia-cudnn-cu13",
        version: VersionQuery::Returned("cudnnGetVersion", [10_000, 100, 1]),
    },
];

/// A library.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Library {
    /// As people call it.
    pub(crate) name: &'static str,
    /// As programs load it.
    pub(crate) file: &'static str,
    /// Whether a worker that was built for CUDA needs it.
    pub(crate) needed: bool,
    /// The package of NVIDIA's repositories for Debian and Ubuntu that has it.
    pub(crate) package: &'static str,
    /// The wheel on PyPI that has it.
    pub(crate) wheel: &'static str,
    version: VersionQuery,
}

/// The function of a library that tells its version, and what that number counts: so much a major, a minor, a patch.
#[derive(Debug, PartialEq, Eq)]
enum VersionQuery {
    /// `int f(int *version)`.
    Number(&'static str, [u64; 3]),
    /// `size_t f(void)`.
    Returned(&'static str, [u64; 3]),
    /// `int f(int *major, int *minor)`.
    Pair(&'static str),
    /// `int f(int part, int *value)`; parts 0, 1 and 2 are major, minor and patch.
    Property(&'static str),
}

/// A library that was loaded.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Loaded {
    /// None: it does not say.
    pub(crate) version: Option<String>,
    pub(crate) path: Option<PathBuf>,
}

impl Library {
    /// Loads it into this process.
    pub(super) fn load(&self) -> Result<Loaded> {
        let library = open(self.file)?;
        Ok(Loaded { version: self.version.read(&library).ok(), path: loaded_from(self.file) })
    }
}

/// Loads the library of this file into this process; the error is the loader's own word.
pub(super) fn open(file: &str) -> Result<libloading::Library> {
    // SAFETY: what the library does when it is loaded is why this runs in a process of its own.
    let library = unsafe { libloading::Library::new(file) };
    library.map_err(|error| match error.source() {
        Some(said) => anyhow!("{said}"),
        None => error.into(),
    })
}

/// Where the library of this name that the process has loaded is, links followed.
pub(super) fn loaded_from(file: &str) -> Option<PathBuf> {
    // The file's own name may have more numbers at its end.
    let (stem, _) = file.split_once(".so")?;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])));
    paths.find(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.and_then(|name| name.strip_prefix(stem)).is_some_and(|rest| rest.starts_with(".so"))
    })
}

impl VersionQuery {
    fn read(&self, library: &libloading::Library) -> Result<String> {
        let parts = match self {
            Self::Number(name, units) => {
                let function = function::<unsafe extern "C" fn(*mut c_int) -> c_int>(library, name)?;
                let mut version = 0;
                // SAFETY: the variant says the type.
                check(name, unsafe { function(&raw mut version) })?;
                split(version.try_into()?, *units)
            }
            Self::Returned(name, units) => {
                let function = function::<unsafe extern "C" fn() -> usize>(library, name)?;
                // SAFETY: the variant says the type.
                split(unsafe { function() } as u64, *units)
            }
            Self::Pair(name) => {
                let function =
                    function::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(library, name)?;
                let (mut major, mut minor) = (0, 0);
                // SAFETY: the variant says the type.
                check(name, unsafe { function(&raw mut major, &raw mut minor) })?;
                vec![major.try_into()?, minor.try_into()?]
            }
            Self::Property(name) => {
                let function = function::<unsafe extern "C" fn(c_int, *mut c_int) -> c_int>(library, name)?;
                let mut parts = Vec::new();
                for part in 0..3 {
                    let mut value = 0;
                    // SAFETY: the variant says the type.
                    check(name, unsafe { function(part, &raw mut value) })?;
                    parts.push(value.try_into()?);
                }
                parts
            }
        };
        Ok(parts.iter().map(u64::to_string).collect::<Vec<_>>().join("."))
    }
}

/// A version as it is written, without the parts that count nothing.
fn split(version: u64, units: [u64; 3]) -> Vec<u64> {
    let mut rest = version;
    let counted = units.into_iter().filter(|unit| *unit > 0);
    counted
        .map(|unit| {
            let part = rest / unit;
            rest %= unit;
            part
        })
        .collect()
}

fn function<'a, T>(library: &'a libloading::Library, name: &str) -> Result<libloading::Symbol<'a, T>> {
    // SAFETY: the callers give the type that the library's header has for it.
    unsafe { library.get(name) }.with_context(|| format!("has no {name}"))
}

fn check(name: &str, code: c_int) -> Result<()> {
    ensure!(code == 0, "{name}: error {code}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn library_versions_are_decoded() {
        assert_eq!(split(13_000, [1000, 10, 0]), [13, 0]);
        assert_eq!(split(13_020, [1000, 10, 0]), [13, 2]);
        assert_eq!(split(22_809, [10_000, 100, 1]), [2, 28, 9]);
        assert_eq!(split(91_900, [10_000, 100, 1]), [9, 19, 0]);
    }

    #[test]
    fn loaded_libraries_have_a_path() {
        let path = loaded_from("libc.so.6").unwrap();
        assert!(path.is_absolute() && path.exists(), "{}", path.display());
        assert_eq!(loaded_from("libcudart.so.13"), None);
    }
}
