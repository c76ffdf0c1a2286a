//! Access to the storage of CPU tensors.

use std::cell::Cell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Shape, Storage, Tensor, WithDType};

/// Number of elements of a task of a parallel loop; for fewer, a second thread does not pay off.
pub(crate) const MIN_PARALLEL_ELEMENTS: usize = 16 * 1024;

/// Reads a contiguous CPU tensor's elements.
pub(crate) fn read<T: WithDType, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        candle_core::bail!("operation on a tensor that is not on the CPU");
    };
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("operation on a tensor of shape {:?} that is not contiguous", tensor.shape());
    };
    Ok(f(&storage.as_slice::<T>()?[start..end]))
}

/// Reads the elements of a contiguous f32 tensor.
pub fn read_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    read::<f32, R>(tensor, f)
}

/// Changes the elements of a contiguous f32 tensor in place. Views of the same storage change too.
pub fn update_f32<R>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    update(tensor, f, |storage| match storage {
        CpuStorage::F32(data) => Some(data),
        _ => None,
    })
}

/// Changes the elements of a contiguous u8 tensor in place; see [`update_f32`].
pub(crate) fn update_u8<R>(tensor: &Tensor, f: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
    update(tensor, f, |storage| match storage {
        CpuStorage::U8(data) => Some(data),
        _ => None,
    })
}

fn update<T: WithDType, R>(
    tensor: &Tensor,
    f: impl FnOnce(&mut [T]) -> R,
    elements: Elements<T>,
) -> Result<R> {
    let op = Update { f: Cell::new(Some(f)), elements, result: Cell::new(None) };
    tensor.inplace_op1(&op)?;
    op.result.take().ok_or_else(|| candle_core::Error::Msg("in-place operation did not run".into()))
}

/// Returns the elements of a storage, or `None` if the storage has another type.
type Elements<T> = fn(&mut CpuStorage) -> Option<&mut Vec<T>>;

struct Update<F, T, R> {
    f: Cell<Option<F>>,
    elements: Elements<T>,
    result: Cell<Option<R>>,
}

impl<T: WithDType, R, F: FnOnce(&mut [T]) -> R> InplaceOp1 for Update<F, T, R> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (Some(data), Some((start, end))) = ((self.elements)(storage), layout.contiguous_offsets()) else {
            candle_core::bail!("in-place operation on a tensor that is not contiguous {}", T::DTYPE.as_str());
        };
        if let Some(f) = self.f.take() {
            self.result.set(Some(f(&mut data[start..end])));
        }
        Ok(())
    }
}

/// Creates an f32 tensor and lets `f` fill its zeroed elements.
pub(crate) fn new_filled(shape: impl Into<Shape>, f: impl FnOnce(&mut [f32])) -> Result<Tensor> {
    let shape = shape.into();
    let mut data = vec![0.0; shape.elem_count()];
    f(&mut data);
    Tensor::from_vec(data, shape, &candle_core::Device::Cpu)
}

/// A pointer that threads share to write disjoint parts of one buffer.
#[derive(Clone, Copy)]
pub(crate) struct SharedMutPtr(*mut f32);

// SAFETY: the callers of `at` guarantee that no two threads access the same element.
unsafe impl Send for SharedMutPtr {}
// SAFETY: as above.
unsafe impl Sync for SharedMutPtr {}

impl SharedMutPtr {
    pub(crate) fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// # Safety
    /// `offset` is inside the buffer, the buffer outlives the pointer, and no other thread accesses
    /// the elements that are written.
    pub(crate) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: guaranteed by the caller.
        unsafe { self.0.add(offset) }
    }
}
