//! The numbers that codes stand for, equal to those of bitsandbytes.

/// The values of the sixteen codes of a 4-bit weight, in units of the absolute maximum of their
/// block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codebook {
    /// NormalFloat: quantiles of the normal distribution (QLoRA, arXiv 2305.14314).
    Nf4,
    /// A sign, two bits of exponent and one of mantissa; both codes of zero give +0.
    Fp4,
}

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// In units of 1/12.
const FP4: [f32; 8] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];

impl Codebook {
    /// The values of codes 0 to 15.
    pub fn values(self) -> [f32; 16] {
        match self {
            Self::Nf4 => NF4,
            Self::Fp4 => std::array::from_fn(|code| {
                let value = FP4[code % 8] / 12.0;
                if code > 8 { -value } else { value }
            }),
        }
    }
}

/// The signed dynamic map of 8 bits, ascending (arXiv 1511.04561): seven decades, each with twice
/// as many numbers as the one below. The numbers of a decade are the midpoints between evenly
/// spaced boundaries.
pub fn dynamic_map() -> [f32; 256] {
    dynamic(true)
}

/// The dynamic map without negative numbers, and with twice as many positive ones.
pub fn dynamic_map_unsigned() -> [f32; 256] {
    dynamic(false)
}

fn dynamic(signed: bool) -> [f32; 256] {
    let mut map = Vec::with_capacity(256);
    for decade in 0..7 {
        let intervals = if signed { 1_usize } else { 2 } << decade;
        let step = (1.0 - 0.1_f32) / intervals as f32;
        // torch counts from the nearer end, with one rounding.
        let boundary = |i: usize| match i < intervals.div_ceil(2) {
            true => step.mul_add(i as f32, 0.1),
            false => (-step).mul_add((intervals - i) as f32, 1.0),
        };
        let unit = 10_f64.powi(decade - 6) as f32;
        for i in 0..intervals {
            let mean = unit * ((boundary(i) + boundary(i + 1)) / 2.0);
            map.push(mean);
            if signed {
                map.push(-mean);
            }
        }
    }
    map.extend([0.0, 1.0]);
    map.sort_by(f32::total_cmp);
    std::array::from_fn(|i| map[i])
}
