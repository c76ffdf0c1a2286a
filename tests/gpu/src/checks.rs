//! Runs the checks and prints their table.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::Args;
use crate::check::{Check, TestBench};

/// Runs every check in order.
///
/// # Errors
/// A check failed, or no check was run.
pub(crate) fn run(args: &Args) -> Result<()> {
    let device = lora_train::open_device(args.device)?;
    let seed = args.seed.unwrap_or_else(rand::random);
    println!("{}, seed {seed}", lora_train::numerics_id(&device)?);
    let bench = TestBench { device, seed };
    let mut checks: Vec<Check> = crate::ops::checks();
    checks.extend(crate::golden::checks(&args.golden)?);
    checks.extend(crate::steps::checks(&args.example));
    checks.extend(crate::memory::checks());
    let (mut passed, mut failed) = (0, 0);
    for check in checks.iter().filter(|check| check.name.contains(&args.only)) {
        let started = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| (check.run)(&bench)));
        let result = result.unwrap_or_else(|_| Err(anyhow::anyhow!("the check panicked; see above")));
        let seconds = started.elapsed().as_secs_f64();
        let (count, word, detail) = match result {
            Ok(detail) => (&mut passed, "ok", detail),
            Err(error) => (&mut failed, "WRONG", format!("{error:#}")),
        };
        *count += 1;
        println!("{word:<5} {:<40} {seconds:>6.2} s  {detail}", check.name);
    }
    println!("{passed} passed, {failed} failed");
    if failed > 0 || passed == 0 {
        bail!("{failed} of {} checks failed", passed + failed);
    }
    Ok(())
}
