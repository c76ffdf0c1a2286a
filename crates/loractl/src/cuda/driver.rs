//! The driver, and the GPUs that it reports.

use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use libloading::{Library, Symbol};
use serde::{Deserialize, Serialize};

use super::libraries;

/// The library of the driver that programs load.
pub(super) const DRIVER_LIBRARY: &str = "libcuda.so.1";
/// The CUDA version that a worker is built for, as the driver encodes it: 1000 * major + 10 *
/// minor.
pub(crate) const MIN_CUDA_VERSION: i32 = 13_000;

/// Size of the buffer for the name of a GPU, in bytes.
const NAME_BYTES: usize = 256;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const CAPABILITY_ATTRIBUTES: [c_int; 2] = [75, 76];

/// The state of the driver on this machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Driver {
    /// Path of the library.
    pub(crate) path: Option<PathBuf>,
    /// The newest CUDA version that the driver supports: 1000 * major + 10 * minor.
    pub(crate) cuda: i32,
    /// Version of the kernel module, such as `580.95.05`.
    pub(crate) version: Option<String>,
    /// GPUs, in the order of their numbers.
    pub(crate) gpus: Vec<DriverGpu>,
    /// Pairs of GPU numbers; the first GPU of a pair can access the memory of the second.
    pub(crate) peers: Vec<(usize, usize)>,
    /// The reason why no GPU can be used.
    pub(crate) problem: Option<String>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DriverGpu {
    pub(crate) name: String,
    pub(crate) memory_bytes: u64,
    /// Major and minor number.
    pub(crate) compute_capability: (i32, i32),
}

impl Driver {
    /// Loads the driver into this process and queries it.
    pub(super) fn load() -> Result<Self> {
        let api = DriverApi(libraries::open(DRIVER_LIBRARY)?);
        let mut driver = Self {
            path: libraries::loaded_from(DRIVER_LIBRARY),
            cuda: api.number("cuDriverGetVersion")?,
            version: std::fs::read_to_string("/proc/driver/nvidia/version")
                .ok()
                .and_then(|text| release(&text)),
            gpus: Vec::new(),
            peers: Vec::new(),
            problem: None,
        };
        let problem = api.init().and_then(|()| {
            for device in api.devices()? {
                driver.gpus.push(api.gpu(device)?);
            }
            driver.peers = api.peers()?;
            Ok(())
        });
        driver.problem = problem.err().map(|error| format!("{error:#}"));
        Ok(driver)
    }
}

/// Formats a CUDA version: 13000 is `13.0`.
pub(crate) fn version_text(cuda: i32) -> String {
    format!("{}.{}", cuda / 1000, cuda % 1000 / 10)
}

/// Returns the first word that looks like a release, such as 580.95.05. The words around it differ
/// between drivers.
fn release(text: &str) -> Option<String> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let is_release = |word: &&str| word.contains('.') && word.split('.').all(is_number);
    text.lines().next()?.split_whitespace().find(is_release).map(str::to_owned)
}

/// The functions of the driver. Each of them returns 0 for success.
struct DriverApi(Library);

type Init = unsafe extern "C" fn(c_int) -> c_int;
type Number = unsafe extern "C" fn(*mut c_int) -> c_int;
type DriverQuery = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
type QueryPair = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
type Name = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
type Size = unsafe extern "C" fn(*mut usize, c_int) -> c_int;
type ErrorName = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;

impl DriverApi {
    fn init(&self) -> Result<()> {
        let init = self.function::<Init>("cuInit")?;
        // SAFETY: cuda.h: `CUresult cuInit(unsigned int flags)`; the flags must be 0.
        self.check("cuInit", unsafe { init(0) })
    }

    /// Calls a function of the type `CUresult name(int *)`.
    fn number(&self, name: &str) -> Result<c_int> {
        let function = self.function::<Number>(name)?;
        let mut value = 0;
        // SAFETY: the callers name functions of this type.
        self.check(name, unsafe { function(&raw mut value) })?;
        Ok(value)
    }

    fn devices(&self) -> Result<Vec<c_int>> {
        let get = self.function::<DriverQuery>("cuDeviceGet")?;
        let count = self.number("cuDeviceGetCount")?;
        let device = |number| {
            let mut device = 0;
            // SAFETY: cuda.h: `CUresult cuDeviceGet(CUdevice *device, int ordinal)`; a CUdevice is
            // an int.
            self.check("cuDeviceGet", unsafe { get(&raw mut device, number) })?;
            Ok(device)
        };
        (0..count).map(device).collect()
    }

    fn gpu(&self, device: c_int) -> Result<DriverGpu> {
        let mut name = [0 as c_char; NAME_BYTES];
        let get_name = self.function::<Name>("cuDeviceGetName")?;
        // SAFETY: cuda.h: `CUresult cuDeviceGetName(char *name, int len, CUdevice dev)`; the text
        // ends with a zero.
        self.check("cuDeviceGetName", unsafe {
            get_name(name.as_mut_ptr(), NAME_BYTES as c_int - 1, device)
        })?;
        let mut memory = 0_usize;
        let total_memory = self.function::<Size>("cuDeviceTotalMem_v2")?;
        // SAFETY: cuda.h: `CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice dev)`.
        self.check("cuDeviceTotalMem", unsafe { total_memory(&raw mut memory, device) })?;
        let attribute = |attribute| self.query_pair("cuDeviceGetAttribute", attribute, device);
        Ok(DriverGpu {
            // SAFETY: the array begins as zeros, and the call cannot write its last byte, so the
            // text ends with a zero.
            name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
            memory_bytes: memory as u64,
            compute_capability: (attribute(CAPABILITY_ATTRIBUTES[0])?, attribute(CAPABILITY_ATTRIBUTES[1])?),
        })
    }

    fn peers(&self) -> Result<Vec<(usize, usize)>> {
        let devices = self.devices()?;
        let mut peers = Vec::new();
        for (i, one) in devices.iter().enumerate() {
            for (j, other) in devices.iter().enumerate().filter(|(j, _)| i != *j) {
                if self.query_pair("cuDeviceCanAccessPeer", *one, *other)? != 0 {
                    peers.push((i, j));
                }
            }
        }
        Ok(peers)
    }

    /// Calls a function of the type `CUresult name(int *, int, int)`.
    fn query_pair(&self, name: &str, one: c_int, other: c_int) -> Result<c_int> {
        let function = self.function::<QueryPair>(name)?;
        let mut value = 0;
        // SAFETY: the callers name functions of this type.
        self.check(name, unsafe { function(&raw mut value, one, other) })?;
        Ok(value)
    }

    fn function<T>(&self, name: &str) -> Result<Symbol<'_, T>> {
        // SAFETY: the callers give the type of the function in cuda.h.
        unsafe { self.0.get(name) }.with_context(|| format!("{DRIVER_LIBRARY} has no {name}"))
    }

    /// Returns an error with its name and text if `code` is not 0.
    fn check(&self, what: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = |name: &str| {
            let get = self.function::<ErrorName>(name).ok()?;
            let mut text = std::ptr::null();
            // SAFETY: cuda.h: `CUresult cuGetErrorName(CUresult error, const char **pStr)`;
            // cuGetErrorString has the same type. The texts are constants.
            let known = unsafe { get(code, &raw mut text) } == 0 && !text.is_null();
            // SAFETY: the pointer is not null, so it points to a constant that ends with a zero.
            known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        match (text("cuGetErrorName"), text("cuGetErrorString")) {
            (Some(name), Some(string)) => bail!("{what}: {name} ({code}): {string}"),
            _ => bail!("{what}: error {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_release_is_parsed() {
        for (text, expected) in [
            (
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12.3.0",
                Some("550.54.15"),
            ),
            (
                "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build",
                Some("580.95.05"),
            ),
            ("something else\n1.2", None),
        ] {
            assert_eq!(release(text).as_deref(), expected);
        }
        assert_eq!([version_text(13_000), version_text(12_080)], ["13.0", "12.8"]);
    }
}
