//! The driver, and the GPUs that it shows.

use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use libloading::{Library, Symbol};
use serde::{Deserialize, Serialize};

use super::libraries;

/// What programs load of the driver.
pub(super) const DRIVER_LIBRARY: &str = "libcuda.so.1";
/// The CUDA that a worker is built for, as the driver counts: 1000 * major + 10 * minor.
pub(crate) const MIN_CUDA_VERSION: i32 = 13_000;

/// Bytes of a GPU's name.
const NAME_BYTES: usize = 256;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const CAPABILITY_ATTRIBUTES: [c_int; 2] = [75, 76];

/// The driver's word on this machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Driver {
    /// Where the library is.
    pub(crate) path: Option<PathBuf>,
    /// The newest CUDA that it knows: 1000 * major + 10 * minor.
    pub(crate) cuda: i32,
    /// Of the kernel's module, such as `580.95.05`.
    pub(crate) version: Option<String>,
    /// By their numbers.
    pub(crate) gpus: Vec<DriverGpu>,
    /// Pairs of GPUs of which the first reaches the second one's memory.
    pub(crate) peers: Vec<(usize, usize)>,
    /// Why no GPU can be used.
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
    /// Loads the driver into this process and asks it.
    pub(super) fn load() -> Result<Self> {
        let api = Api(libraries::open(DRIVER_LIBRARY)?);
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

/// As people write it: 13000 is 13.0.
pub(crate) fn version_text(cuda: i32) -> String {
    format!("{}.{}", cuda / 1000, cuda % 1000 / 10)
}

/// The first word that looks like a release, such as 580.95.05: the words around it differ.
fn release(text: &str) -> Option<String> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let is_release = |word: &&str| word.contains('.') && word.split('.').all(is_number);
    text.lines().next()?.split_whitespace().find(is_release).map(str::to_owned)
}

/// Functions of the driver, which all return 0 where they succeed.
struct Api(Library);

type Init = unsafe extern "C" fn(c_int) -> c_int;
type Number = unsafe extern "C" fn(*mut c_int) -> c_int;
type Of = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
type QueryPair = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
type Name = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
type Size = unsafe extern "C" fn(*mut usize, c_int) -> c_int;
type ErrorName = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;

impl Api {
    fn init(&self) -> Result<()> {
        let init = self.function::<Init>("cuInit")?;
        // SAFETY: cuda.h: `CUresult cuInit(unsigned int flags)`; the flags must be 0.
        self.check("cuInit", unsafe { init(0) })
    }

    /// `CUresult name(int *)`.
    fn number(&self, name: &str) -> Result<c_int> {
        let function = self.function::<Number>(name)?;
        let mut value = 0;
        // SAFETY: the callers name functions of this type.
        self.check(name, unsafe { function(&raw mut value) })?;
        Ok(value)
    }

    fn devices(&self) -> Result<Vec<c_int>> {
        let get = self.function::<Of>("cuDeviceGet")?;
        let count = self.number("cuDeviceGetCount")?;
        let device = |number| {
            let mut device = 0;
            // SAFETY: cuda.h: `CUresult cuDeviceGet(CUdevice *device, int ordinal)`; a CUdevice is an int.
            self.check("cuDeviceGet", unsafe { get(&raw mut device, number) })?;
            Ok(device)
        };
        (0..count).map(device).collect()
    }

    fn gpu(&self, device: c_int) -> Result<DriverGpu> {
        let mut name = [0 as c_char; NAME_BYTES];
        let get_name = self.function::<Name>("cuDeviceGetName")?;
        // SAFETY: cuda.h: `CUresult cuDeviceGetName(char *name, int len, CUdevice dev)`, which ends it with a zero.
        self.check("cuDeviceGetName", unsafe {
            get_name(name.as_mut_ptr(), NAME_BYTES as c_int - 1, device)
        })?;
        let mut memory = 0_usize;
        let total_memory = self.function::<Size>("cuDeviceTotalMem_v2")?;
        // SAFETY: cuda.h: `CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice dev)`.
        self.check("cuDeviceTotalMem", unsafe { total_memory(&raw mut memory, device) })?;
        let attribute = |attribute| self.of_two("cuDeviceGetAttribute", attribute, device);
        Ok(DriverGpu {
            // SAFETY: the last byte of the array is a zero that nobody has written to.
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
                if self.of_two("cuDeviceCanAccessPeer", *one, *other)? != 0 {
                    peers.push((i, j));
                }
            }
        }
        Ok(peers)
    }

    /// `CUresult name(int *, int, int)`.
    fn of_two(&self, name: &str, one: c_int, other: c_int) -> Result<c_int> {
        let function = self.function::<QueryPair>(name)?;
        let mut value = 0;
        // SAFETY: the callers name functions of this type.
        self.check(name, unsafe { function(&raw mut value, one, other) })?;
        Ok(value)
    }

    fn function<T>(&self, name: &str) -> Result<Symbol<'_, T>> {
        // SAFETY: the callers give the type that cuda.h has for it.
        unsafe { self.0.get(name) }.with_context(|| format!("{DRIVER_LIBRARY} has no {name}"))
    }

    /// An error where `code` is one.
    fn check(&self, what: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = |name: &str| {
            let get = self.function::<ErrorName>(name).ok()?;
            let mut text = std::ptr::null();
            // SAFETY: cuda.h: `CUresult cuGetErrorName(CUresult error, const char **pStr)`, and cuGetErrorString alike; the
            // texts are constants.
            let known = unsafe { get(code, &raw mut text) } == 0 && !text.is_null();
            // SAFETY: it is not null, so it is a constant that a zero ends.
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
