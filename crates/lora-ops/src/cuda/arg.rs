//! Arguments of kernels.

use candle_core::Result;

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arg {
    /// The value's bytes, in memory order.
    pub(super) value: [u8; 8],
    /// Bytes that the kernel reads or writes through this argument, for profiles.
    pub(super) operand_bytes: u64,
}

macro_rules! arguments {
    ($($kind:ty),*) => {
        $(impl From<$kind> for Arg {
            fn from(value: $kind) -> Self {
                let mut bytes = [0; 8];
                let value = value.to_le_bytes();
                bytes[..value.len()].copy_from_slice(&value);
                Self { value: bytes, operand_bytes: 0 }
            }
        })*
    };
}
arguments!(u32, i32, u64, f32, f64);

impl Arg {
    /// A number of elements, as the kernels take it.
    ///
    /// # Errors
    /// 2^32 elements or more.
    pub(crate) fn size(n: usize) -> Result<Self> {
        match u32::try_from(n) {
            Ok(n) => Ok(n.into()),
            Err(_) => candle_core::bail!("{n} elements in one dimension are too many for a kernel"),
        }
    }

    /// Sets the number of bytes that the kernel reads or writes through this argument.
    pub(crate) fn with_bytes(self, operand_bytes: usize) -> Self {
        Self { operand_bytes: operand_bytes as u64, ..self }
    }

    /// Counts the bytes of this argument twice, for a kernel that both reads and writes them.
    pub(crate) fn updated(self) -> Self {
        Self { operand_bytes: 2 * self.operand_bytes, ..self }
    }
}
