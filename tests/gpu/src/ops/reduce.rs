//! Sums over long vectors, fingerprints, and sums of vectors in a given order.

use anyhow::{Context as _, Result, ensure};
use candle_core::DType;
use lora_ops::cuda::{address, stream, tree_combine};
use lora_ops::reduce::{fingerprint, scale, sum_of_squares};
use lora_ops::transfer::from_vec;

use crate::check::{Check, TestBench, compare, values};

/// Lengths around those of the chunks.
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
        ensure!(sum_of_squares(&gpu)?.to_bits() == got.to_bits(), "other bits the second time");
    }
    let wrong = from_vec(vec![1.0_f32, f32::NAN, 2.0], 3, &bench.device)?;
    ensure!(!sum_of_squares(&wrong)?.is_finite(), "an element that is not a number is hidden");
    Ok(format!("{worst:.1e}"))
}

fn scaled(bench: &TestBench) -> Result<String> {
    let mut said = String::new();
    for skip in [0, 1] {
        let (cpu, gpu) = bench.random("x", &[1027], 1.0, DType::F32)?;
        scale(&cpu.narrow(0, skip, 1026)?, 0.3)?;
        scale(&gpu.narrow(0, skip, 1026)?, 0.3)?;
        said = compare("x", &gpu, &cpu, 0.0)?;
    }
    Ok(said)
}

fn fingerprints(bench: &TestBench) -> Result<String> {
    // More than the blocks of one launch take at once.
    let (cpu, gpu) = bench.random("long", &[4_300_000], 1.0, DType::F32)?;
    let want = fingerprint(&[&cpu])?;
    ensure!(fingerprint(&[&gpu])? == want, "of one vector");
    let cuts = [0, 1, 5000, 5000, 4_300_000];
    let parts = cuts.windows(2).map(|cut| gpu.narrow(0, cut[0], cut[1] - cut[0]));
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    ensure!(fingerprint(&parts.iter().collect::<Vec<_>>())? == want, "of the same vector in parts");
    let mixed = [parts[0].clone(), cpu.narrow(0, 1, 4999)?, parts[2].clone(), parts[3].clone()];
    ensure!(fingerprint(&mixed.each_ref())? == want, "of the same vector on both devices");
    scale(&gpu.narrow(0, 3_999_999, 1)?, -1.0)?;
    ensure!(fingerprint(&[&gpu])? != want, "a sign changed and the fingerprint did not");
    Ok(format!("{:016x}{:016x}", want[0], want[1]))
}

/// On a stream of its own, as beside a computation.
fn tree(bench: &TestBench) -> Result<String> {
    let compute = stream(&bench.device)?.context("the device is no GPU")?;
    let beside = compute.context().new_stream()?;
    // Each sum is read by a later one; and more pairs than one launch takes.
    let short = vec![(0, 1), (3, 4), (0, 3), (2, 0)];
    let long = (0..150).map(|i| (i * 7 % 5, (i * 7 + 1 + i % 3) % 5)).collect::<Vec<_>>();
    for (order, n) in [(&short, 1), (&short, 1027), (&short, 40_000), (&long, 1030)] {
        let (cpu, gpu) = bench.random("vectors", &[5, n], 1.0, DType::F32)?;
        bench.device.synchronize()?;
        tree_combine(&beside, order, address(&gpu)?, n)?;
        beside.synchronize()?;
        let mut want = cpu.to_vec2::<f32>()?;
        for &(left, right) in order {
            let from = want[right].clone();
            want[left].iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
        let want: Vec<f64> = want.concat().into_iter().map(f64::from).collect();
        ensure!(values(&gpu)? == want, "{} pairs of {n} elements", order.len());
    }
    Ok("exact".into())
}
