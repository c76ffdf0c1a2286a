//! Access to the storage of CPU tensors.
//!
//! A kernel locks its operands, first the one that it updates in place, and computes with their
//! slices. The slices borrow the guards, so the locks are held until the kernel returns:
//! ```text
//! let a = &mut *update_f32(a, &[b])?;
//! let b = &*read_f32(b)?;
//! ```
//! Views of one storage share its lock. Two operands may read one storage. A kernel that updates a
//! storage and locks it a second time would wait for itself, so [`update_f32`] takes the other
//! operands and returns an error if one of them has the same storage.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, WithDType};
use parking_lot::{MappedRwLockReadGuard, MappedRwLockWriteGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Number of elements of a task of a parallel loop; for fewer, a second thread does not pay off.
pub(crate) const TASK_ELEMENTS: usize = 16 * 1024;

/// The elements of a contiguous CPU tensor, whose storage is locked for reading.
pub type ReadGuard<'a, T> = MappedRwLockReadGuard<'a, [T]>;

/// The elements of a contiguous CPU tensor, whose storage is locked for writing.
pub type UpdateGuard<'a, T> = MappedRwLockWriteGuard<'a, [T]>;

/// Locks a contiguous f32 tensor on the CPU for reading.
///
/// # Errors
/// The tensor is not on the CPU, not contiguous or of another type.
pub fn read_f32(tensor: &Tensor) -> Result<ReadGuard<'_, f32>> {
    read(tensor)
}

/// Locks a contiguous CPU tensor of type `T` for reading; see [`read_f32`].
pub(crate) fn read<T: WithDType>(tensor: &Tensor) -> Result<ReadGuard<'_, T>> {
    let (storage, layout) = tensor.storage_and_layout();
    RwLockReadGuard::try_map_or_err(storage, |storage| elements(storage, layout)).map_err(|(_, error)| error)
}

fn elements<'a, T: WithDType>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    let Storage::Cpu(storage) = storage else {
        candle_core::bail!("operation on a tensor that is not on the CPU");
    };
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("operation on a tensor of shape {:?} that is not contiguous", layout.shape());
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// Locks a contiguous f32 tensor on the CPU for an update in place. Views of its storage change
/// too.
///
/// `others` are all other operands of the operation. While the guard lives, its thread must not
/// lock another tensor of this storage.
///
/// # Errors
/// One of `others` has the same storage; the tensor is not on the CPU, not contiguous or of another
/// type.
pub fn update_f32<'a>(tensor: &'a Tensor, others: &[&Tensor]) -> Result<UpdateGuard<'a, f32>> {
    update(tensor, others, |storage| match storage {
        CpuStorage::F32(data) => Some(data),
        _ => None,
    })
}

/// Locks a contiguous u8 tensor on the CPU for an update in place; see [`update_f32`].
pub(crate) fn update_u8<'a>(tensor: &'a Tensor, others: &[&Tensor]) -> Result<UpdateGuard<'a, u8>> {
    update(tensor, others, |storage| match storage {
        CpuStorage::U8(data) => Some(data),
        _ => None,
    })
}

fn update<'a, T: WithDType>(
    tensor: &'a Tensor,
    others: &[&Tensor],
    elements: impl FnOnce(&mut CpuStorage) -> Option<&mut Vec<T>>,
) -> Result<UpdateGuard<'a, T>> {
    let lock = storage_lock(tensor);
    if others.iter().any(|other| std::ptr::eq(lock, storage_lock(other))) {
        candle_core::bail!(
            "in-place operation on a tensor of shape {:?} that shares its storage with another operand",
            tensor.shape()
        );
    }
    let updated = RwLockWriteGuard::try_map_or_err(lock.write(), |storage| {
        let Storage::Cpu(storage) = storage else {
            candle_core::bail!("in-place operation on a tensor that is not on the CPU");
        };
        let offsets = tensor.layout().contiguous_offsets();
        let (Some(data), Some((start, end))) = (elements(storage), offsets) else {
            candle_core::bail!("in-place operation on a tensor that is not contiguous {}", T::DTYPE.as_str());
        };
        Ok(&mut data[start..end])
    });
    updated.map_err(|(_, error)| error)
}

/// The lock of a tensor's storage.
fn storage_lock(tensor: &Tensor) -> &RwLock<Storage> {
    RwLockReadGuard::rwlock(&tensor.storage_and_layout().0)
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
