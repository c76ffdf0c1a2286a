//! CUDA's libraries, their versions and their paths.

use std::error::Error;
use std::ffi::c_int;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

/// The libraries that a worker built for CUDA loads, and others that doctor reports.
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

/// A library of CUDA.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Library {
    /// Name in messages.
    pub(crate) name: &'static str,
    /// File name that programs load.
    pub(crate) file: &'static str,
    /// Whether a worker that was built for CUDA needs it.
    pub(crate) needed: bool,
    /// The package of NVIDIA's repositories for Debian and Ubuntu that has it.
    pub(crate) package: &'static str,
    /// The wheel on PyPI that has it.
    pub(crate) wheel: &'static str,
    version: VersionQuery,
}

/// The function that returns the version of a library. The numbers are the factors of the major,
/// minor and patch version in the returned number; a factor of 0 means that this part does not
/// exist.
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
    /// `None` if the library does not report its version.
    pub(crate) version: Option<String>,
    pub(crate) path: Option<PathBuf>,
}

impl Library {
    /// Loads the library into this process.
    pub(super) fn load(&self) -> Result<Loaded> {
        let library = open(self.file)?;
        Ok(Loaded { version: self.version.read(&library).ok(), path: loaded_from(self.file) })
    }
}

/// Loads the library with this file name into this process. The error is the message of the loader.
pub(super) fn open(file: &str) -> Result<libloading::Library> {
    // SAFETY: a library may run any code when it is loaded, so this runs in a separate process.
    let library = unsafe { libloading::Library::new(file) };
    library.map_err(|error| match error.source() {
        Some(message) => anyhow!("{message}"),
        None => error.into(),
    })
}

/// Returns the path of a loaded library of this process, with links resolved.
pub(super) fn loaded_from(file: &str) -> Option<PathBuf> {
    // The name of the resolved file may have more numbers at its end.
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
                // SAFETY: the variant defines the type.
                check(name, unsafe { function(&raw mut version) })?;
                split(version.try_into()?, *units)
            }
            Self::Returned(name, units) => {
                let function = function::<unsafe extern "C" fn() -> usize>(library, name)?;
                // SAFETY: the variant defines the type.
                split(unsafe { function() } as u64, *units)
            }
            Self::Pair(name) => {
                let function =
                    function::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(library, name)?;
                let (mut major, mut minor) = (0, 0);
                // SAFETY: the variant defines the type.
                check(name, unsafe { function(&raw mut major, &raw mut minor) })?;
                vec![major.try_into()?, minor.try_into()?]
            }
            Self::Property(name) => {
                let function = function::<unsafe extern "C" fn(c_int, *mut c_int) -> c_int>(library, name)?;
                let mut parts = Vec::new();
                for part in 0..3 {
                    let mut value = 0;
                    // SAFETY: the variant defines the type.
                    check(name, unsafe { function(part, &raw mut value) })?;
                    parts.push(value.try_into()?);
                }
                parts
            }
        };
        Ok(parts.iter().map(u64::to_string).collect::<Vec<_>>().join("."))
    }
}

/// Splits a version number into its parts; a part with the unit 0 is omitted.
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
    // SAFETY: the callers give the type of the function in the library's header.
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
