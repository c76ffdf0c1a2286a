//! The time of one kind of launches on a GPU.

/// All launches of one kernel, or all products of one shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// The kernel's name, or the product's shape such as `product 4096x14336x16 nt bf16 +=` (m x n
    /// x k; `t`: the factor is stored transposed; `+=`: the product is added to the output).
    pub name: String,
    /// m, n and k of a product; `None` for a kernel.
    pub product: Option<[usize; 3]>,
    /// Number of launches.
    pub count: u64,
    /// Total time of all launches, from event to event.
    pub milliseconds: f64,
    /// Bytes of the operands of all launches, read or written; 0 if they are not known.
    pub bytes: u64,
    /// Floating-point operations of all launches; 0 for kernels.
    pub flops: u64,
}

impl Timing {
    /// 10^9 bytes per second; `None` if the bytes are not known.
    pub fn gb_s(&self) -> Option<f64> {
        rate(self.bytes as f64 / 1e9, self.milliseconds)
    }

    /// 10^12 floating-point operations per second; `None` for kernels.
    pub fn tflop_s(&self) -> Option<f64> {
        rate(self.flops as f64 / 1e12, self.milliseconds)
    }
}

fn rate(amount: f64, milliseconds: f64) -> Option<f64> {
    (amount > 0.0 && milliseconds > 0.0).then(|| amount / (milliseconds / 1e3))
}
