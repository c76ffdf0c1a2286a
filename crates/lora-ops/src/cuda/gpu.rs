//! An open GPU: its stream, kernels, workspace and memory.

use std::sync::{Arc, PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::cublas;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, result, sys,
};
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId};
use candle_core::{CudaDevice, DType, Device, Result, Storage, Tensor};
use lora_spec::GPU_WORKSPACE_BYTES;

use super::arg::Arg;
use super::environment;
use super::error::cuda_error;
use super::input_upload::InputUploader;
use super::kernels::LoadedKernels;
use super::pool::{check_memory_pools, set_pool_release_threshold};

/// cuBLAS adds bf16 products in f32, and does not round f32 operands to TF32.
const MATH_MODE: cublas::sys::cublasMath_t =
    cublas::sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;

/// All GPUs that this process has opened.
static OPEN_GPUS: RwLock<Vec<Arc<Gpu>>> = RwLock::new(Vec::new());

pub(crate) struct Gpu {
    pub(super) device: CudaDevice,
    pub(super) stream: Arc<CudaStream>,
    pub(super) uploader: InputUploader,
    /// Copies results to the host while the compute stream runs.
    pub(super) downloads: Arc<CudaStream>,
    kernels: LoadedKernels,
    /// Memory that was free before the first tensor was allocated, in bytes.
    pub(super) free: u64,
    /// cuBLAS holds the address of the workspace.
    _workspace: CudaSlice<u8>,
}

/// The number of GPUs that CUDA sees; 0 if there is no GPU or no driver.
pub fn devices() -> usize {
    if result::init().is_err() {
        return 0;
    }
    CudaContext::device_count().map_or(0, |count| usize::try_from(count).unwrap_or(0))
}

/// Opens the GPU `ordinal`, or returns it if it is already open.
///
/// # Errors
/// There is no such GPU, or the program has no kernels for its architecture.
pub fn open(ordinal: usize) -> Result<Device> {
    let mut opened = OPEN_GPUS.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = opened.iter().find(|gpu| gpu.stream.context().ordinal() == ordinal) {
        return Ok(Device::Cuda(gpu.device.clone()));
    }
    let count = devices();
    if ordinal >= count {
        candle_core::bail!("device cuda:{ordinal}: CUDA finds {count} GPUs; `loractl doctor` has details");
    }
    let gpu = Arc::new(Gpu::open(ordinal)?);
    opened.push(gpu.clone());
    Ok(Device::Cuda(gpu.device.clone()))
}

/// The compute stream of a GPU; `None` for the CPU.
pub fn stream(device: &Device) -> Result<Option<Arc<CudaStream>>> {
    match device {
        Device::Cuda(device) => Ok(Some(Gpu::from_device(device)?.stream.clone())),
        _ => Ok(None),
    }
}

/// The unique identifier of a GPU, in hex; `None` for the CPU.
pub fn uuid(device: &Device) -> Result<Option<String>> {
    let Some(stream) = stream(device)? else { return Ok(None) };
    let uuid = stream.context().uuid().map_err(cuda_error("the GPU's identity"))?;
    Ok(Some(uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect()))
}

/// The address of the first element of an f32 tensor on a GPU.
///
/// # Errors
/// The tensor is not on a GPU, not f32 or not contiguous.
pub fn address(tensor: &Tensor) -> Result<u64> {
    match tensor.device() {
        Device::Cuda(device) => Gpu::from_device(device)?.address(tensor, DType::F32),
        _ => candle_core::bail!("a tensor that is not on a GPU has no GPU address"),
    }
}

impl Gpu {
    /// The open GPU of candle's device handle.
    pub(crate) fn from_device(device: &CudaDevice) -> Result<Arc<Self>> {
        let opened = OPEN_GPUS.read().unwrap_or_else(PoisonError::into_inner);
        let is = |id: DeviceId| move |gpu: &&Arc<Self>| gpu.device.id() == id;
        match opened.iter().find(is(device.id())) {
            Some(gpu) => Ok(gpu.clone()),
            None => candle_core::bail!("the GPU was not opened with lora_ops::device::open"),
        }
    }

    /// The open GPU of a stream.
    pub(crate) fn from_stream(stream: &CudaStream) -> Result<Arc<Self>> {
        let opened = OPEN_GPUS.read().unwrap_or_else(PoisonError::into_inner);
        let ordinal = stream.context().ordinal();
        match opened.iter().find(|gpu| gpu.stream.context().ordinal() == ordinal) {
            Some(gpu) => Ok(gpu.clone()),
            None => {
                candle_core::bail!("the stream's GPU {ordinal} was not opened with lora_ops::device::open")
            }
        }
    }

    fn open(ordinal: usize) -> Result<Self> {
        check_memory_pools(ordinal)?;
        let device = CudaDevice::new_with_stream(ordinal)?;
        // SAFETY: tensors are used on one stream only; other streams that access their memory wait
        // for explicit events.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        let context = stream.context().clone();
        set_pool_release_threshold(&context).map_err(cuda_error("the memory pool"))?;
        context.bind_to_thread().map_err(cuda_error("the GPU"))?;
        let kernels = LoadedKernels::load(&context).map_err(cuda_error("the kernels cannot be loaded"))?;
        let (free, _) = context.mem_get_info().map_err(cuda_error("the GPU's memory"))?;
        let workspace = stream.alloc_zeros::<u8>(GPU_WORKSPACE_BYTES).map_err(cuda_error("the workspace"))?;
        let handle = *device.cublas_handle().handle();
        let (address, _) = workspace.device_ptr(&stream);
        // SAFETY: the workspace lives as long as this struct, which is the handle's only user.
        let set = unsafe {
            cublas::sys::cublasSetWorkspace_v2(handle, address as *mut _, GPU_WORKSPACE_BYTES)
                .result()
                .and_then(|()| cublas::sys::cublasSetMathMode(handle, MATH_MODE).result())
        };
        set.map_err(|e| candle_core::Error::Msg(format!("cuBLAS: {e:?}")).bt())?;
        let uploader = InputUploader::new(&stream)?;
        let downloads = context.new_stream().map_err(cuda_error("a stream for copies"))?;
        for (variable, value) in environment::that_change_bits(environment::of_process) {
            tracing::warn!(
                variable,
                value,
                "an environment variable changes the bits of results; they are comparable only with \
                 results of runs that set it too"
            );
        }
        Ok(Self { device, stream, uploader, downloads, kernels, free: free as u64, _workspace: workspace })
    }

    /// The kernel with this name.
    pub(super) fn function(&self, name: &str) -> Result<sys::CUfunction> {
        match self.kernels.get(name) {
            Some(function) => Ok(function),
            None => candle_core::bail!("kernel {name} does not exist"),
        }
    }

    /// Records an event after all work that was submitted so far.
    pub(crate) fn event(&self) -> Result<CudaEvent> {
        self.stream.record_event(None).map_err(cuda_error("an event"))
    }

    /// The address of a tensor's first element.
    ///
    /// # Errors
    /// The tensor is not on this GPU, not contiguous or not of type `dtype`.
    pub(crate) fn address(&self, tensor: &Tensor, dtype: DType) -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            candle_core::bail!("operation on a tensor that is not on a GPU");
        };
        let Some((start, _)) = layout.contiguous_offsets() else {
            candle_core::bail!("operation on a tensor of shape {:?} that is not contiguous", tensor.shape());
        };
        if storage.device.id() != self.device.id() {
            candle_core::bail!("operation on a tensor of another GPU");
        }
        if tensor.dtype() != dtype {
            candle_core::bail!("operation on a tensor of {:?} instead of {dtype:?}", tensor.dtype());
        }
        let base = match &storage.slice {
            CudaStorageSlice::F32(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::BF16(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::F64(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::U32(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::U8(slice) => slice.device_ptr(&self.stream).0,
            _ => candle_core::bail!("no operation supports {:?}", tensor.dtype()),
        };
        Ok(base + (start * dtype.size_in_bytes()) as u64)
    }

    /// A tensor as a kernel's argument; see [`Self::address`].
    pub(crate) fn arg(&self, tensor: &Tensor, dtype: DType) -> Result<Arg> {
        let bytes = tensor.elem_count() * dtype.size_in_bytes();
        Ok(Arg::from(self.address(tensor, dtype)?).with_bytes(bytes))
    }

    /// Describes everything that the bits of a result depend on: the GPU and its number of
    /// multiprocessors, the origin of the kernels' machine code, cuBLAS, and environment variables
    /// that change bits.
    pub(crate) fn describe(&self) -> Result<String> {
        let context = self.stream.context();
        let name = context.name().map_err(cuda_error("the GPU's name"))?;
        let (major, minor) = context.compute_capability().map_err(cuda_error("the GPU's capability"))?;
        let multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(cuda_error("the GPU's multiprocessors"))?;
        let mut cublas = 0;
        // SAFETY: the handle is live, and the version is a local variable.
        unsafe { cublas::sys::cublasGetVersion_v2(*self.device.cublas_handle().handle(), &raw mut cublas) }
            .result()
            .map_err(|e| candle_core::Error::Msg(format!("cuBLAS: {e:?}")).bt())?;
        let code = self.kernels.code();
        let mut described =
            format!("cuda {name} sm_{major}{minor} {multiprocessors} SMs {code} cublas {cublas}");
        for (variable, value) in environment::that_change_bits(environment::of_process) {
            described += &format!(" {variable}={value}");
        }
        Ok(described)
    }

    /// Returns the error that the GPU has reported, if any. Does not wait.
    pub(crate) fn check(&self) -> Result<()> {
        let context = self.stream.context();
        // SAFETY: context and stream are live.
        let state = unsafe {
            result::ctx::set_current(context.cu_ctx()).and_then(|()| {
                match sys::cuStreamQuery(self.stream.cu_stream()) {
                    sys::CUresult::CUDA_ERROR_NOT_READY => Ok(()),
                    state => state.result(),
                }
            })
        };
        state.map_err(cuda_error("the GPU"))
    }
}
