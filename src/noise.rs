//! Numbers that look random and are the same everywhere, for made-up weights, tokens and pictures.

/// `SplitMix64` (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub struct Noise(u64);

impl Noise {
    /// The same seed gives the same values.
    pub const fn new(seed: u64) -> Self {
        Noise(seed)
    }

    /// 64 bits, each as likely 0 as 1.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is at least 1 and far below 2^64.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Nearly normal, mean 0 and deviation 1: the sum of four uniform values, without functions
    /// that differ from one machine's library to another's.
    pub fn normal(&mut self) -> f32 {
        let bits = self.bits();
        let sum: f32 = (0..4).map(|i| f32::from((bits >> (16 * i)) as u16)).sum();
        // Each has mean 65535 / 2 and variance (65536^2 - 1) / 12.
        (sum - 2.0 * 65535.0) * (3f32.sqrt() / 65536.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Noise;

    /// The first numbers of the published generator from the seed 1234567.
    #[test]
    fn it_is_the_published_generator() {
        let mut noise = Noise::new(1_234_567);
        let first = [noise.bits(), noise.bits(), noise.bits()];
        assert_eq!(
            first,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }
}
