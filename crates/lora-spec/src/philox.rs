//! Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy
//! as 1, 2, 3" (SC 2011). Every draw is a pure function of a key and a counter, so no draw depends
//! on the process that makes it, or on the order of draws.

/// The generator with its key. Each pair of a seed and a purpose has its own stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    /// Creates the stream of `seed` for `purpose`, for example a module path. The key is the 64-bit
    /// FNV-1a hash of the little-endian bytes of `seed`, followed by those of `purpose`.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let bytes = seed.to_le_bytes();
        let hash = bytes
            .iter()
            .chain(purpose.as_bytes())
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
        Self { key: [hash as u32, (hash >> 32) as u32] }
    }

    /// Returns the two words of the key, for other implementations of the generator.
    pub fn key(&self) -> [u32; 2] {
        self.key
    }

    /// Returns the four random words at `counter`.
    #[inline]
    pub fn words(&self, counter: [u32; 4]) -> [u32; 4] {
        let [mut c0, mut c1, mut c2, mut c3] = counter;
        let [mut k0, mut k1] = self.key;
        for _ in 0..10 {
            let p0 = u64::from(c0) * 0xD251_1F53;
            let p1 = u64::from(c2) * 0xCD9E_8D57;
            (c0, c1, c2, c3) =
                ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        [c0, c1, c2, c3]
    }

    /// Returns a whole number below `bound` (at least 1) at `counter`, with a bias of at most 2^-64
    /// (multiply-shift on 128 bits).
    pub fn below(&self, bound: u64, counter: [u32; 4]) -> u64 {
        let w = self.words(counter);
        let draw = u64::from(w[0]) | u64::from(w[1]) << 32;
        ((u128::from(draw) * u128::from(bound)) >> 64) as u64
    }

    /// Converts a random word to a number in [0, 1), a multiple of 2^-24.
    #[inline]
    pub fn unit(word: u32) -> f32 {
        (word >> 8) as f32 * (1.0 / 16_777_216.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Philox;

    /// The known answers that are published with Random123.
    #[test]
    fn matches_the_published_test_vectors() {
        let zero = Philox { key: [0, 0] };
        assert_eq!(zero.words([0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Philox { key: [u32::MAX; 2] };
        assert_eq!(ones.words([u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = Philox { key: [0xa409_3822, 0x299f_31d0] };
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(pi.words(counter), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn units_are_multiples_of_a_power_of_two_below_1() {
        assert_eq!([0, 255, 256, 1 << 31].map(Philox::unit), [0.0, 0.0, f32::powi(0.5, 24), 0.5]);
        assert_eq!(Philox::unit(u32::MAX), 1.0 - f32::powi(0.5, 24));
    }

    #[test]
    fn draws_stay_below_their_bound() {
        let philox = Philox::new(7, "test");
        let mut seen = [0; 5];
        for i in 0..1000 {
            seen[philox.below(5, [i, 0, 0, 0]) as usize] += 1;
        }
        assert!(seen.iter().all(|n| (150..250).contains(n)), "{seen:?}");
        assert_eq!(philox.below(1, [0; 4]), 0);
    }
}
