//! Conversion between codes and the numbers that they stand for.

use std::sync::LazyLock;

use crate::quant::{dynamic_map, dynamic_map_unsigned};

/// A bucket of numbers is the upper half of an f32: a sign, an exponent and seven bits of the
/// fraction. All numbers below 2^-23 share one bucket, because the only bound of a map there is at
/// zero, and so do all numbers from 1 on.
const LOWEST_BUCKET: u32 = 0x3400;
const HIGHEST_BUCKET: u32 = 0x3f80;
const BUCKETS: usize = (HIGHEST_BUCKET - LOWEST_BUCKET) as usize + 1;

/// A map of 256 ascending numbers.
pub(super) struct QuantMap {
    values: [f32; 256],
    /// `bounds[i]` is the largest number whose nearest code is not above `i`.
    bounds: [f32; 256],
    /// The code of the smallest number of each bucket; the code of the largest is at most one
    /// higher.
    first: [u8; 2 * BUCKETS],
}

/// The map of the first moment.
pub(super) static SIGNED_MAP: LazyLock<QuantMap> = LazyLock::new(|| {
    let values = dynamic_map();
    let mut bounds = bounds(&values);
    // A negative moment never becomes zero: its sign decides the direction of the update.
    if let Some(below) = values.iter().rposition(|value| *value < 0.0) {
        bounds[below] = -f32::from_bits(1);
    }
    QuantMap::new(values, bounds)
});

/// The map of the second moment.
pub(super) static UNSIGNED_MAP: LazyLock<QuantMap> = LazyLock::new(|| {
    let values = dynamic_map_unsigned();
    QuantMap::new(values, bounds(&values))
});

fn bounds(values: &[f32; 256]) -> [f32; 256] {
    std::array::from_fn(|i| {
        let Some(above) = values.get(i + 1) else { return f32::INFINITY };
        let middle = (values[i] + above) * 0.5;
        // The exact middle belongs to the even code.
        if i % 2 == 0 { middle } else { middle.next_down() }
    })
}

impl QuantMap {
    fn new(values: [f32; 256], bounds: [f32; 256]) -> Self {
        let first = std::array::from_fn(|i| {
            let upper = ((i % BUCKETS) as u32 + LOWEST_BUCKET) << 16;
            let least = match (i / BUCKETS, i % BUCKETS) {
                (0, 0) => 0.0,
                (0, _) => f32::from_bits(upper),
                _ => -f32::from_bits(upper | 0xffff),
            };
            bounds.partition_point(|bound| *bound < least) as u8
        });
        Self { values, bounds, first }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn values(&self) -> [f32; 256] {
        self.values
    }

    #[cfg(feature = "cuda")]
    pub(super) fn bounds(&self) -> [f32; 256] {
        self.bounds
    }

    #[inline(always)]
    pub(super) fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    /// The code of the number nearest to `x`; `x` is between -1 and 1, and `bucket` is its bucket.
    #[inline(always)]
    pub(super) fn code(&self, x: f32, bucket: u32) -> u8 {
        let first = self.first[bucket as usize];
        first + u8::from(self.bounds[usize::from(first)] < x)
    }
}

#[inline(always)]
pub(super) fn bucket(x: f32) -> u32 {
    let bits = x.to_bits();
    let size = (bits & 0x7fff_ffff) >> 16;
    size.clamp(LOWEST_BUCKET, HIGHEST_BUCKET) - LOWEST_BUCKET + (bits >> 31) * BUCKETS as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_the_nearest_map_value() {
        for (name, map) in [("signed", &SIGNED_MAP), ("unsigned", &UNSIGNED_MAP)] {
            let is_signed = map.values[0] < 0.0;
            // Both ends of every bucket, every bound with its neighbors, and the numbers
            // themselves.
            let ends = (0..=1.0_f32.to_bits() >> 16)
                .flat_map(|key| [key << 16, key << 16 | 0xffff])
                .map(f32::from_bits);
            let near = map.bounds.into_iter().flat_map(|b| [b.next_down(), b, b.next_up()]);
            let all = ends.flat_map(|x| [x, -x]).chain(near).chain(map.values);
            for x in all.filter(|x| (if is_signed { -1.0 } else { 0.0 }..=1.0).contains(x)) {
                let code = map.code(x, bucket(x));
                let searched = map.bounds.partition_point(|bound| *bound < x);
                assert_eq!(usize::from(code), searched, "{name} {x:e}");
                let off = |code: usize| (f64::from(map.values[code]) - f64::from(x)).abs();
                let nearest = (0..256).map(off).fold(f64::INFINITY, f64::min);
                if is_signed && x < 0.0 {
                    assert!(map.value(code) < 0.0, "{x:e}");
                } else {
                    // The middle between two numbers was rounded to f32.
                    assert!(off(searched) <= nearest + 3e-7 * f64::from(x), "{name} {x:e}");
                }
            }
            assert!(
                map.values
                    .iter()
                    .enumerate()
                    .all(|(i, value)| usize::from(map.code(*value, bucket(*value))) == i)
            );
        }
    }
}
