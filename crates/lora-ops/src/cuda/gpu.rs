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
use super::error::{CudaResult, cuda_error};
use super::input_upload::InputUploader;
use super::kernels::LoadedKernels;
use super::pool::{check_memory_pools, set_pool_release_threshold};
use crate::gpu_properties::GpuProperties;

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

/// The compute stream of a GPU.
///
/// # Errors
/// The device is not a GPU.
pub fn stream(device: &Device) -> Result<Arc<CudaStream>> {
    match device {
        Device::Cuda(device) => Ok(Gpu::from_device(device)?.stream.clone()),
        _ => candle_core::bail!("a device that is not a GPU has no stream"),
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

    pub(crate) fn properties(&self) -> Result<GpuProperties> {
        let context = self.stream.context();
        let properties = || -> CudaResult<GpuProperties> {
            let uuid = context.uuid()?.bytes;
            let (free, total) = context.mem_get_info()?;
            Ok(GpuProperties {
                ordinal: context.ordinal(),
                uuid: uuid.iter().map(|byte| format!("{:02x}", *byte as u8)).collect(),
                name: context.name()?,
                compute_capability: context.compute_capability()?,
                free_bytes: free as u64,
                total_bytes: total as u64,
            })
        };
        properties().map_err(cuda_error("the GPU's properties"))
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
