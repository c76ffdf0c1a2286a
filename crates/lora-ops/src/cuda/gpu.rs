//! A GPU that was opened: its stream, kernels, workspace and memory.

use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, result, sys,
};
use candle_core::cuda_backend::cudarc::{cublas, driver};
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor, WithDType};
use half::bf16;
use lora_spec::GPU_WORKSPACE;

use super::launch::Arg;
use super::stage::Staging;
use crate::device::Memory;

/// Every operation's kernels, compiled.
const IMAGES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The GPUs that were opened.
static OPENED: RwLock<Vec<Arc<Gpu>>> = RwLock::new(Vec::new());

pub(crate) struct Gpu {
    pub(super) device: CudaDevice,
    pub(super) stream: Arc<CudaStream>,
    pub(super) staging: Staging,
    functions: Functions,
    /// Memory that was free before the first tensor, in bytes.
    free: u64,
    /// cuBLAS holds its address.
    _workspace: CudaSlice<u8>,
}

/// An error of CUDA's libraries.
pub(crate) fn wrong(what: &str) -> impl FnOnce(driver::DriverError) -> candle_core::Error + '_ {
    move |error| {
        let text = error.error_string().ok().and_then(|text| text.to_str().ok()).unwrap_or("unknown error");
        candle_core::Error::Msg(format!("{what}: CUDA error {:?}: {text}", error.0)).bt()
    }
}

/// Number of GPUs that CUDA sees; 0 where there is none or no driver.
pub fn devices() -> usize {
    if result::init().is_err() {
        return 0;
    }
    CudaContext::device_count().map_or(0, |count| usize::try_from(count).unwrap_or(0))
}

/// Opens the GPU `ordinal`; the same one again where it is open.
///
/// # Errors
/// There is no such GPU, or none of the kernels' architectures fits it.
pub fn open(ordinal: usize) -> Result<Device> {
    let mut opened = OPENED.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = opened.iter().find(|gpu| gpu.stream.context().ordinal() == ordinal) {
        return Ok(Device::Cuda(gpu.device.clone()));
    }
    let count = devices();
    if ordinal >= count {
        candle_core::bail!("device cuda:{ordinal}: CUDA sees {count} GPUs; `loractl doctor` says more");
    }
    let gpu = Arc::new(Gpu::open(ordinal)?);
    opened.push(gpu.clone());
    Ok(Device::Cuda(gpu.device.clone()))
}

/// The stream that a GPU's operations go to; `None` for the CPU.
pub fn stream(device: &Device) -> Result<Option<Arc<CudaStream>>> {
    match device {
        Device::Cuda(device) => Ok(Some(Gpu::of(device)?.stream.clone())),
        _ => Ok(None),
    }
}

/// What tells a GPU from every other one, in hex; `None` for the CPU.
pub fn uuid(device: &Device) -> Result<Option<String>> {
    let Some(stream) = stream(device)? else { return Ok(None) };
    let uuid = stream.context().uuid().map_err(wrong("the GPU's identity"))?;
    Ok(Some(uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect()))
}

/// The address of the first element of an f32 tensor on a GPU.
///
/// # Errors
/// It is elsewhere, of another type or not contiguous.
pub fn address(tensor: &Tensor) -> Result<u64> {
    match tensor.device() {
        Device::Cuda(device) => Gpu::of(device)?.address(tensor, DType::F32),
        _ => candle_core::bail!("a tensor that is not on a GPU has no address there"),
    }
}

impl Gpu {
    /// The opened GPU behind candle's handle.
    pub(crate) fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        let opened = OPENED.read().unwrap_or_else(PoisonError::into_inner);
        let is = |id: DeviceId| move |gpu: &&Arc<Self>| gpu.device.id() == id;
        match opened.iter().find(is(device.id())) {
            Some(gpu) => Ok(gpu.clone()),
            None => candle_core::bail!("a GPU that was not opened with lora_ops::open"),
        }
    }

    /// The opened GPU that a stream is on.
    pub(crate) fn of_stream(stream: &CudaStream) -> Result<Arc<Self>> {
        let opened = OPENED.read().unwrap_or_else(PoisonError::into_inner);
        let ordinal = stream.context().ordinal();
        match opened.iter().find(|gpu| gpu.stream.context().ordinal() == ordinal) {
            Some(gpu) => Ok(gpu.clone()),
            None => candle_core::bail!(
                "a stream of GPU {ordinal}, which was not opened with lora_ops::device::open"
            ),
        }
    }

    fn open(ordinal: usize) -> Result<Self> {
        let device = CudaDevice::new_with_stream(ordinal)?;
        // SAFETY: all work of a tensor is on the one stream; what else touches its memory waits for events of its own.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        let context = stream.context().clone();
        if !context.has_async_alloc() {
            candle_core::bail!("device cuda:{ordinal} has no memory pools; a driver of CUDA 13 has them");
        }
        keep_freed_memory(&context).map_err(wrong("the memory pool"))?;
        context.bind_to_thread().map_err(wrong("the GPU"))?;
        let functions = Functions::load().map_err(wrong("the kernels cannot be loaded"))?;
        let (free, _) = context.mem_get_info().map_err(wrong("the GPU's memory"))?;
        let workspace = stream.alloc_zeros::<u8>(GPU_WORKSPACE).map_err(wrong("the workspace"))?;
        let handle = *device.cublas_handle().handle();
        let (address, _) = workspace.device_ptr(&stream);
        // SAFETY: the workspace lives as long as the handle's only user, this struct.
        let set = unsafe {
            cublas::sys::cublasSetWorkspace_v2(handle, address as *mut _, GPU_WORKSPACE)
                .result()
                .and_then(|()| cublas::sys::cublasSetMathMode(handle, super::blas::math_mode()).result())
        };
        set.map_err(|e| candle_core::Error::Msg(format!("cuBLAS: {e:?}")).bt())?;
        let staging = Staging::new(&stream)?;
        Ok(Self { device, stream, staging, functions, free: free as u64, _workspace: workspace })
    }

    /// The kernel of this name.
    pub(super) fn function(&self, name: &str) -> Result<sys::CUfunction> {
        match self.functions.0.get(name) {
            Some(function) => Ok(*function),
            None => candle_core::bail!("there is no kernel {name}"),
        }
    }

    /// An event after everything that was asked for so far.
    pub(crate) fn event(&self) -> Result<CudaEvent> {
        self.stream.record_event(None).map_err(wrong("an event"))
    }

    /// A new tensor whose elements are not set.
    pub(crate) fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        // An allocation of nothing is an error of CUDA's.
        let len = shape.elem_count().max(1);
        let device = self.device.clone();
        // SAFETY: the caller's kernel writes the elements before anything reads them.
        let storage = unsafe {
            match dtype {
                DType::F32 => CudaStorage::wrap_cuda_slice(self.device.alloc::<f32>(len)?, device),
                DType::BF16 => CudaStorage::wrap_cuda_slice(self.device.alloc::<bf16>(len)?, device),
                DType::F64 => CudaStorage::wrap_cuda_slice(self.device.alloc::<f64>(len)?, device),
                DType::U32 => CudaStorage::wrap_cuda_slice(self.device.alloc::<u32>(len)?, device),
                other => candle_core::bail!("no operation makes {other:?}"),
            }
        };
        Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
    }

    /// Sets a contiguous tensor's elements to 0.
    pub(crate) fn zero(&self, tensor: &Tensor) -> Result<()> {
        let dtype = tensor.dtype();
        let (address, bytes) = (self.address(tensor, dtype)?, tensor.elem_count() * dtype.size_in_bytes());
        if bytes == 0 {
            return Ok(());
        }
        let set = || {
            self.stream.context().bind_to_thread()?;
            // SAFETY: the bytes are the tensor's.
            unsafe { result::memset_d8_async(address, 0, bytes, self.stream.cu_stream()) }
        };
        set().map_err(wrong("zeros"))
    }

    /// The address of a tensor's first element.
    ///
    /// # Errors
    /// It is not on this GPU, not contiguous or not of this type.
    pub(crate) fn address(&self, tensor: &Tensor, dtype: DType) -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            candle_core::bail!("operation on a tensor that is not on a GPU");
        };
        let Some((start, _)) = layout.contiguous_offsets() else {
            candle_core::bail!("operation on a tensor of shape {:?} that is not contiguous", tensor.shape());
        };
        if storage.device.id() != self.device.id() || tensor.dtype() != dtype {
            candle_core::bail!("operation on a tensor of {:?}, not {dtype:?}", tensor.dtype());
        }
        let base = match &storage.slice {
            CudaStorageSlice::F32(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::BF16(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::F64(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::U32(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::U8(slice) => slice.device_ptr(&self.stream).0,
            _ => candle_core::bail!("no operation takes {:?}", tensor.dtype()),
        };
        Ok(base + (start * dtype.size_in_bytes()) as u64)
    }

    /// A tensor as a kernel's argument; see [`Self::address`].
    pub(crate) fn arg(&self, tensor: &Tensor, dtype: DType) -> Result<Arg> {
        let bytes = tensor.elem_count() * dtype.size_in_bytes();
        Ok(Arg::from(self.address(tensor, dtype)?).with_bytes(bytes))
    }

    /// Replaces the elements of a tensor.
    pub(crate) fn write<T: WithDType>(&self, tensor: &Tensor, values: &[T]) -> Result<()> {
        let to = self.address(tensor, T::DTYPE)?;
        let write = || {
            self.stream.context().bind_to_thread()?;
            // SAFETY: the caller has compared the lengths, and the copy is over before `values` can go.
            unsafe { result::memcpy_htod_async(to, values, self.stream.cu_stream())? };
            self.stream.synchronize()
        };
        write().map_err(wrong("a copy to the GPU"))
    }

    /// Reads the elements of a tensor.
    pub(crate) fn read<T: WithDType>(&self, tensor: &Tensor, values: &mut [T]) -> Result<()> {
        let from = self.address(tensor, T::DTYPE)?;
        if tensor.elem_count() != values.len() {
            candle_core::bail!("{:?} for {} values", tensor.shape(), values.len());
        }
        let mut read = || {
            self.stream.context().bind_to_thread()?;
            // SAFETY: the lengths are equal, and the copy is over before `values` can go.
            unsafe { result::memcpy_dtoh_async(values, from, self.stream.cu_stream())? };
            self.stream.synchronize()
        };
        read().map_err(wrong("a copy from the GPU"))
    }

    /// What the bits of a result depend on.
    pub(crate) fn describe(&self) -> Result<String> {
        let context = self.stream.context();
        let name = context.name().map_err(wrong("the GPU's name"))?;
        let (major, minor) = context.compute_capability().map_err(wrong("the GPU's capability"))?;
        let mut cublas = 0;
        // SAFETY: the handle is live and the version a local variable.
        unsafe { cublas::sys::cublasGetVersion_v2(*self.device.cublas_handle().handle(), &raw mut cublas) }
            .result()
            .map_err(|e| candle_core::Error::Msg(format!("cuBLAS: {e:?}")).bt())?;
        Ok(format!("cuda {name} sm_{major}{minor} cublas {cublas}"))
    }

    /// An error that the GPU reported, if any. Does not wait.
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
        state.map_err(wrong("the GPU"))
    }

    pub(crate) fn memory(&self) -> Result<Memory> {
        let context = self.stream.context();
        let read = || {
            context.bind_to_thread()?;
            let of_pool = |attribute| pool_attribute(context, attribute);
            Ok((
                of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
                of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
                context.total_mem()? as u64,
            ))
        };
        let (used_bytes, peak_bytes, total_bytes) = read().map_err(wrong("the GPU's memory"))?;
        Ok(Memory { used_bytes, peak_bytes, free_bytes: self.free, total_bytes })
    }
}

/// The kernels by their names, for the life of the process.
struct Functions(HashMap<String, sys::CUfunction>);

// SAFETY: CUDA's handles of functions are bound to no thread.
unsafe impl Send for Functions {}
// SAFETY: as above.
unsafe impl Sync for Functions {}

impl Functions {
    /// Loads all kernels into the context that is bound to this thread. Were they loaded when they are first used, that could
    /// wait for all that the GPU does: for NCCL too, and with it for another rank.
    fn load() -> std::result::Result<Self, driver::DriverError> {
        let mut loaded = HashMap::new();
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
                    sys::cuFuncLoad(function).result()?;
                    let mut name = std::ptr::null();
                    sys::cuFuncGetName(&raw mut name, function).result()?;
                    loaded.insert(CStr::from_ptr(name).to_string_lossy().into_owned(), function);
                }
            }
        }
        Ok(Self(loaded))
    }
}

/// Memory that was freed stays with the process: the next step wants it again.
fn keep_freed_memory(context: &CudaContext) -> std::result::Result<(), driver::DriverError> {
    let mut all = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute's value is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut all).cast())
    }
}

fn pool_attribute(
    context: &CudaContext,
    attribute: sys::CUmemPool_attribute,
) -> std::result::Result<u64, driver::DriverError> {
    let mut value = 0_u64;
    // SAFETY: the attributes that are asked for are u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast())?;
    }
    Ok(value)
}
