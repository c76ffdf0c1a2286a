//! The kernels that a GPU has loaded.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;

use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, result, sys};

use super::environment;

/// Every operation's kernels, compiled.
const IMAGES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Where the machine code of the kernels comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CodeOrigin {
    /// From the program, made by nvcc for this compute capability.
    Machine(i32),
    /// From the program's PTX of this virtual architecture, translated by a driver of this version.
    Ptx { architecture: i32, driver: i32 },
}

impl fmt::Display for CodeOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(capability) => write!(f, "code sm_{capability}"),
            Self::Ptx { architecture, driver } => write!(f, "code compute_{architecture} driver {driver}"),
        }
    }
}

impl CodeOrigin {
    /// nvcc makes machine code and PTX of equal numbers only (see build.rs): where they differ, the driver
    /// has translated PTX for its GPU. With `is_forced` the driver translates PTX also where they are
    /// equal.
    fn from_versions(binary_version: i32, ptx_version: i32, driver: i32, is_forced: bool) -> Self {
        if binary_version == ptx_version && !is_forced {
            Self::Machine(binary_version)
        } else {
            Self::Ptx { architecture: ptx_version, driver }
        }
    }
}

/// The kernels by their names, for the life of the process.
pub(super) struct LoadedKernels {
    by_name: HashMap<String, sys::CUfunction>,
    code: CodeOrigin,
}

// SAFETY: CUDA's handles of functions are bound to no thread.
unsafe impl Send for LoadedKernels {}
// SAFETY: as above.
unsafe impl Sync for LoadedKernels {}

impl LoadedKernels {
    /// Loads all kernels into `context`, which is bound to this thread, and lets each have as much dynamic
    /// shared memory as a block can. A kernel that is loaded when it is first used could wait for all that
    /// the GPU does: for NCCL too, and with it for another rank.
    pub(super) fn load(context: &CudaContext) -> Result<Self, DriverError> {
        let shared_of_block = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut driver = 0;
        // SAFETY: the version is a local variable.
        unsafe { sys::cuDriverGetVersion(&raw mut driver).result()? };
        let is_forced = environment::forces_translation(environment::of_process);
        let (mut by_name, mut code) = (HashMap::new(), CodeOrigin::Machine(0));
        for image in IMAGES {
            // Aligned, as the bytes in the program need not be.
            let image = image.to_vec();
            // SAFETY: an image that nvcc made; sizes and pointers are of what is asked for.
            unsafe {
                let module = result::module::load_data(image.as_ptr().cast())?;
                let mut count = 0;
                sys::cuModuleGetFunctionCount(&raw mut count, module).result()?;
                let mut functions = vec![std::ptr::null_mut(); count as usize];
                sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module).result()?;
                for function in functions {
                    use sys::CUfunction_attribute_enum as Attribute;
                    sys::cuFuncLoad(function).result()?;
                    let shared = attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
                    let dynamic = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    sys::cuFuncSetAttribute(function, dynamic, shared_of_block - shared).result()?;
                    code = CodeOrigin::from_versions(
                        attribute(function, Attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION)?,
                        attribute(function, Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?,
                        driver,
                        is_forced,
                    );
                    let mut name = std::ptr::null();
                    sys::cuFuncGetName(&raw mut name, function).result()?;
                    by_name.insert(CStr::from_ptr(name).to_string_lossy().into_owned(), function);
                }
            }
        }
        Ok(Self { by_name, code })
    }

    pub(super) fn get(&self, name: &str) -> Option<sys::CUfunction> {
        self.by_name.get(name).copied()
    }

    /// Where their machine code comes from: of all of them from one place, for they are all compiled alike.
    pub(super) fn code(&self) -> CodeOrigin {
        self.code
    }
}

/// # Safety
/// The function is loaded.
unsafe fn attribute(
    function: sys::CUfunction,
    attribute: sys::CUfunction_attribute_enum,
) -> Result<i32, DriverError> {
    let mut value = 0;
    // SAFETY: as promised; the value is a local variable.
    unsafe { sys::cuFuncGetAttribute(&raw mut value, attribute, function).result()? };
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jit_compiled_kernels_report_the_driver_version() {
        assert_eq!(CodeOrigin::from_versions(90, 90, 13000, false).to_string(), "code sm_90");
        // Machine code for sm_80 runs on sm_86 as it is.
        assert_eq!(CodeOrigin::from_versions(80, 80, 13000, false).to_string(), "code sm_80");
        assert_eq!(
            CodeOrigin::from_versions(120, 80, 13010, false).to_string(),
            "code compute_80 driver 13010"
        );
        // On a GPU of the architecture of the PTX the numbers do not tell.
        assert_eq!(
            CodeOrigin::from_versions(80, 80, 13000, true).to_string(),
            "code compute_80 driver 13000"
        );
    }
}
