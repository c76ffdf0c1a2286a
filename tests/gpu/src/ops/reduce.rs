//! Reductions of long vectors, fingerprints, and sums of vectors in a given order.

use anyhow::{Result, ensure};
use candle_core::DType;
use lora_ops::cuda::stream;
use lora_ops::device::gpu_address;
use lora_ops::reduce::{fingerprint, scale, sum_of_squares, tree_combine};
use lora_ops::transfer::from_vec;

use crate::check::{Check, TestBench, compare, values};

/// Vector lengths, some around the length of a chunk.
const LENGTHS: [usize; 6] = [1, 33, 4095, 4096, 4097, 200_003];

pub(crate) fn checks() -> Vec<Check> {
    vec![
        Check::new("sum of squares", squares),
        Check::new("scale", scaled),
        Check::new("fingerprint", fingerprints),
        Check::new("tree combine", tree),
    ]
}

fn squares(bench: &TestBench) -> Result<String> {
    let mut worst = 0.0_f64;
    for n in LENGTHS {
        let (cpu, gpu) = bench.random("x", &[n], 1.0, DType::F32)?;
        let (want, got) = (sum_of_squares(&cpu)?, sum_of_squares(&gpu)?);
        worst = worst.max((got - want).abs() / want);
        ensure!(worst <= 1e-6, "{got} instead of {want} for {n} elements");
        ensure!(sum_of_squares(&gpu)?.to_bits() == got.to_bits(), "a second run gave different bits");
    }
    let with_nan = from_vec(vec![1.0_f32, f32::NAN, 2.0], 3, &bench.device)?;
    ensure!(!sum_of_squares(&with_nan)?.is_finite(), "the sum of a vector with NaN is finite");
    Ok(format!("{worst:.1e}"))
}

fn scaled(bench: &TestBench) -> Result<String> {
    let mut detail = String::new();
    for skip in [0, 1] {
        let (cpu, gpu) = bench.random("x", &[1027], 1.0, DType::F32)?;
        scale(&cpu.narrow(0, skip, 1026)?, 0.3)?;
        scale(&gpu.narrow(0, skip, 1026)?, 0.3)?;
        detail = compare("x", &gpu, &cpu, 0.0)?;
    }
    Ok(detail)
}

fn fingerprints(bench: &TestBench) -> Result<String> {
    // The vector is longer than the blocks of one launch read at once.
    let (cpu, gpu) = bench.random("long", &[4_300_000], 1.0, DType::F32)?;
    let want = fingerprint(&[&cpu])?;
    ensure!(fingerprint(&[&gpu])? == want, "the fingerprint of one vector differs");
    let cuts = [0, 1, 5000, 5000, 4_300_000];
    let parts = cuts.windows(2).map(|cut| gpu.narrow(0, cut[0], cut[1] - cut[0]));
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    ensure!(fingerprint(&parts.iter().collect::<Vec<_>>())? == want, "the fingerprint of parts differs");
    let mixed = [parts[0].clone(), cpu.narrow(0, 1, 4999)?, parts[2].clone(), parts[3].clone()];
    ensure!(fingerprint(&mixed.each_ref())? == want, "the fingerprint of parts on both devices differs");
    scale(&gpu.narrow(0, 3_999_999, 1)?, -1.0)?;
    ensure!(fingerprint(&[&gpu])? != want, "a changed sign does not change the fingerprint");
    Ok(format!("{:016x}{:016x}", want[0], want[1]))
}

/// Checks [`tree_combine`] on a separate stream, on which it runs during a computation.
fn tree(bench: &TestBench) -> Result<String> {
    let compute = stream(&bench.device)?;
    let separate = compute.context().new_stream()?;
    // In `short` later sums read earlier ones; `long` has more pairs than one launch takes.
    let short = vec![(0, 1), (3, 4), (0, 3), (2, 0)];
    let long = (0..150).map(|i| (i * 7 % 5, (i * 7 + 1 + i % 3) % 5)).collect::<Vec<_>>();
    for (order, n) in [(&short, 1), (&short, 1027), (&short, 40_000), (&long, 1030)] {
        let (cpu, gpu) = bench.random("vectors", &[5, n], 1.0, DType::F32)?;
        bench.device.synchronize()?;
        tree_combine(&separate, order, gpu_address(&gpu)?, n)?;
        separate.synchronize()?;
        let mut want = cpu.to_vec2::<f32>()?;
        for &(left, right) in order {
            let from = want[right].clone();
            want[left].iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
        let want: Vec<f64> = want.concat().into_iter().map(f64::from).collect();
        ensure!(values(&gpu)? == want, "the sums of {} pairs of {n} elements differ", order.len());
    }
    Ok("exact".into())
}
