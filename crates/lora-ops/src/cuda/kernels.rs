//! The kernels that a GPU has loaded.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;

use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, result, sys};

use super::environment;

/// The compiled kernels of every operation.
const IMAGES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The origin of the kernels' machine code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CodeOrigin {
    /// Machine code in the program, made by nvcc for this compute capability.
    Machine(i32),
    /// PTX in the program for this virtual architecture, translated by a driver of this version.
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
    /// nvcc makes machine code and PTX of equal versions only (see build.rs). If the versions
    /// differ, the driver has translated PTX for its GPU. With `is_forced` the driver translates
    /// PTX even if they are equal.
    fn from_versions(binary_version: i32, ptx_version: i32, driver: i32, is_forced: bool) -> Self {
        if binary_version == ptx_version && !is_forced {
            Self::Machine(binary_version)
        } else {
            Self::Ptx { architecture: ptx_version, driver }
        }
    }
}

/// The kernels by name; they stay loaded until the process ends.
pub(super) struct LoadedKernels {
    by_name: HashMap<String, sys::CUfunction>,
    code: CodeOrigin,
}

// SAFETY: CUDA's function handles may be used on any thread.
unsafe impl Send for LoadedKernels {}
// SAFETY: as above.
unsafe impl Sync for LoadedKernels {}

impl LoadedKernels {
    /// Loads all kernels into `context`, which must be bound to this thread, and allows each as
    /// much dynamic shared memory as a block can have. A kernel that was loaded lazily, at its
    /// first use, could wait for all work of the GPU, including NCCL's and with it that of another
    /// rank.
    pub(super) fn load(context: &CudaContext) -> Result<Self, DriverError> {
        let shared_of_block = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut driver = 0;
        // SAFETY: the version is a local variable.
        unsafe { sys::cuDriverGetVersion(&raw mut driver).result()? };
        let is_forced = environment::forces_translation(environment::of_process);
        let (mut by_name, mut code) = (HashMap::new(), CodeOrigin::Machine(0));
        for image in IMAGES {
            // Copied because CUDA needs an aligned image, and the bytes in the program may not be
            // aligned.
            let image = image.to_vec();
            // SAFETY: nvcc made the image; sizes and pointers match the requested data.
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

    /// The origin of the machine code. It is the same for all kernels, because they are compiled
    /// alike.
    pub(super) fn code(&self) -> CodeOrigin {
        self.code
    }
}

/// # Safety
/// The function must be loaded.
unsafe fn attribute(
    function: sys::CUfunction,
    attribute: sys::CUfunction_attribute_enum,
) -> Result<i32, DriverError> {
    let mut value = 0;
    // SAFETY: the caller guarantees that the function is loaded; the value is a local variable.
    unsafe { sys::cuFuncGetAttribute(&raw mut value, attribute, function).result()? };
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jit_compiled_kernels_report_the_driver_version() {
        assert_eq!(CodeOrigin::from_versions(90, 90, 13000, false).to_string(), "code sm_90");
        // Machine code for sm_80 also runs on sm_86.
        assert_eq!(CodeOrigin::from_versions(80, 80, 13000, false).to_string(), "code sm_80");
        assert_eq!(
            CodeOrigin::from_versions(120, 80, 13010, false).to_string(),
            "code compute_80 driver 13010"
        );
        // On a GPU of the PTX's own architecture the versions are equal and do not show the origin.
        assert_eq!(
            CodeOrigin::from_versions(80, 80, 13000, true).to_string(),
            "code compute_80 driver 13000"
        );
    }
}
