//! Inner loops in the widest vectors that the machine supports, with sums in one fixed order.

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod instruction_sets;

/// Runs `f` compiled for the best instruction set of this machine, chosen at run time.
///
/// The bits do not depend on the choice: a loop keeps the order of operations of its source for
/// every width of vectors, and the compiler does not fuse products with sums.
#[inline(always)]
pub(crate) fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(not(all(test, target_arch = "x86_64")))]
    let set = pulp::Arch::new();
    #[cfg(all(test, target_arch = "x86_64"))]
    let set = instruction_sets::chosen();
    set.dispatch(f)
}

/// The instruction set that results depend on, which is that of the matrix products:
/// `x86_64 avx512f`, `x86_64 avx2+fma`, `x86_64`, or the name of another architecture.
pub fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        // The gemm crate chooses its kernels by these features, and each kernel sums in another
        // order.
        if std::is_x86_feature_detected!("avx512f") {
            "x86_64 avx512f"
        } else if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            "x86_64 avx2+fma"
        } else {
            "x86_64"
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        std::env::consts::ARCH
    }
}

const LANES: usize = 16;

/// Returns the sum of `f(i)` for `i` below `n`: 16 running sums, which are then added pairwise in a
/// fixed tree.
#[inline(always)]
pub(crate) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = n - n % LANES;
    let mut i = 0;
    while i < whole {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(i + lane);
        }
        i += LANES;
    }
    for (lane, total) in lanes.iter_mut().enumerate().take(n - whole) {
        *total += f(whole + lane);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Returns the dot product of slices of equal length.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    sum(n, |i| a[i] * b[i])
}

/// Returns the largest element; -infinity for an empty slice.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    for &value in chunks.remainder() {
        lanes[0] = if value > lanes[0] { value } else { lanes[0] };
    }
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// Computes `e^x` to about 2 units in the last place: `x = n ln 2 + r` with `|r| <= ln 2 / 2`, a
/// polynomial in `r` (coefficients of Cephes), then the exponent. Below -87.3 the result is about
/// the smallest normal number, above 88.7 it is infinity.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < -87.3 { -87.3 } else { x };
    let clamped = if clamped > 89.0 { 89.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH;
    let r = r - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let y = p * r * r + r + 1.0;
    // n can be 128, which is beyond the exponent range of one factor, so there are two factors.
    let whole = shifted.to_bits() as i32 - ROUND.to_bits() as i32;
    let half = whole >> 1;
    let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let y = y * scale(half) * scale(whole - half);
    // NaN passes both clamps, because comparisons with it are false, and is returned as it is.
    if x.is_nan() { x } else { y }
}

/// Computes `tanh x`: below 0.625 a polynomial (coefficients of Cephes), above it
/// `1 - 2 / (e^(2 x) + 1)`.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let z = x * x;
    let mut p = -5.704_988_7e-3;
    p = p * z + 2.063_908_8e-2;
    p = p * z - 5.373_971_6e-2;
    p = p * z + 1.333_144_2e-1;
    p = p * z - 3.333_328e-1;
    let near = p * z * x + x;
    let far = 1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.625 { near } else { far.copysign(x) }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Looks up the values of 4-bit codes, two per byte, the first in the upper half. `out` must have
/// twice as many elements as `codes`.
pub(crate) fn lookup4(table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return simd.vectorize(|| lookup4_avx2(simd, table, codes, out));
    }
    lookup4_each(table, codes, out);
}

#[inline(always)]
fn lookup4_each(table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
    for (pair, code) in out.chunks_exact_mut(2).zip(codes) {
        pair[0] = table[usize::from(code >> 4)];
        pair[1] = table[usize::from(code & 15)];
    }
}

/// Looks up eight codes at a time; each half of the table is in one register.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn lookup4_avx2(simd: pulp::x86::V3, table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
    use std::arch::x86_64::{__m256, __m256i};
    let half = |i: usize| -> __m256 { pulp::cast::<[f32; 8], _>(std::array::from_fn(|j| table[i + j])) };
    let (low, high) = (half(0), half(8));
    let shifts: __m256i = pulp::cast([4_u32, 0, 12, 8, 20, 16, 28, 24]);
    let (words, rest) = codes.as_chunks::<4>();
    let (eights, rest_out) = out.split_at_mut(words.len() * 8);
    for (out, word) in eights.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        let word = simd.avx._mm256_set1_epi32(i32::from_le_bytes(*word));
        let index = simd.avx2._mm256_srlv_epi32(word, shifts);
        // The permutation uses the lowest three bits of an index. The fourth bit, moved to the
        // sign, selects the half of the table.
        let upper: __m256 = pulp::cast(simd.avx2._mm256_slli_epi32::<28>(index));
        let in_low = simd.avx2._mm256_permutevar8x32_ps(low, index);
        let in_high = simd.avx2._mm256_permutevar8x32_ps(high, index);
        *out = pulp::cast(simd.avx._mm256_blendv_ps(in_low, in_high, upper));
    }
    lookup4_each(table, rest, rest_out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_three_units_in_the_last_place() {
        let mut x = -87.0_f32;
        while x < 88.0 {
            let exact = f64::from(x).exp();
            let error = (f64::from(vectorize(|| exp(x))) - exact).abs() / exact;
            assert!(error < 3.0 * f64::from(f32::EPSILON) / 2.0 * 2.0, "exp({x}) is off by {error}");
            x += 0.0137;
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1.3e-38);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    }

    #[test]
    fn lookup4_decodes_two_codes_per_byte() {
        let table = std::array::from_fn(|i| i as f32);
        let codes: Vec<u8> = (0..=255).chain([0x7f, 0x80, 0x1e]).collect();
        for n in [0, 1, 3, 4, 9, codes.len()] {
            let expected: Vec<f32> =
                codes[..n].iter().flat_map(|c| [f32::from(c >> 4), f32::from(c & 15)]).collect();
            let (mut out, mut each) = (vec![0.0; 2 * n], vec![0.0; 2 * n]);
            lookup4(&table, &codes[..n], &mut out);
            lookup4_each(&table, &codes[..n], &mut each);
            assert_eq!((&out, &each), (&expected, &expected));
        }
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for n in [0, 1, 15, 16, 17, 47] {
            let x: Vec<f32> = (0..n).map(|i| i as f32 - 3.0).collect();
            let ones = vec![1.0; n];
            assert_eq!(dot(&x, &ones), x.iter().sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
