//! `loractl plan`: what a job would do, before it takes anything.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use lora_data::{DataReport, Plan, PlanData};
use lora_spec::JobFile;

use crate::job;
use crate::output::{Format, Table, bytes, count};

/// Say what a job would train on and what it would take, without reading weights
///
/// Rows that would make the job fail are listed, and the exit code is then 1.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  loractl plan examples/dates/job.yaml
  loractl plan job.yaml -o json | jq .total_steps")]
pub(crate) struct Args {
    /// The job file.
    job: PathBuf,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let file = JobFile::read(&args.job)?;
    let plan = job::plan(&file)?;
    args.output.print(&plan, || text(&plan))?;
    for problem in &plan.problems {
        eprintln!("error: {problem}");
    }
    Ok(if plan.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(plan: &Plan) -> String {
    let mut table = Table::new();
    let total = plan.base_parameters + plan.trainable_parameters;
    let share = 100.0 * plan.trainable_parameters as f64 / total.max(1) as f64;
    let modules: Vec<String> = plan.modules.iter().map(|(name, n)| format!("{name} x{n}")).collect();
    table.row("job", &plan.name);
    table.row("base", format!("{} ({} parameters)", plan.base.display(), count(plan.base_parameters)));
    table.row("trained parameters", format!("{} ({share:.2} %)", count(plan.trainable_parameters)));
    table.row("adapted modules", modules.join(", "));
    table.row("adapter size", bytes(plan.adapter_bytes));
    data(&mut table, "training rows", &plan.train);
    if let Some(eval) = &plan.eval {
        data(&mut table, "evaluation rows", eval);
    }
    let steps = format!(
        "{} ({} an epoch, {} of warm-up)",
        count(plan.total_steps),
        count(plan.steps_per_epoch),
        count(plan.warmup_steps)
    );
    table.row("steps", steps);
    table.row("micro-batches a step", format!("{} (the most workers that can share it)", plan.micro_batches));
    let padding = 100.0 * plan.padding;
    table.row(
        "tokens",
        format!("{} ({padding:.0} % of the positions computed are padding)", count(plan.tokens)),
    );
    for note in &plan.notes {
        table.row("note", note);
    }
    format!("{table}\nfirst training row, trained tokens between ⟦ and ⟧:\n{}", plan.sample)
}

fn data(table: &mut Table, name: &str, data: &PlanData) {
    let DataReport {
        rows_read, rows_kept, dropped, without_targets, truncated, tokens, trained_tokens, ..
    } = data.report;
    table.row(
        name,
        format!("{} of {} in {}", count(rows_kept as u64), count(rows_read as u64), data.path.display()),
    );
    for (what, rows) in [("too long", dropped), ("truncated", truncated), ("without target", without_targets)]
    {
        if rows > 0 {
            table.row(format!("  {what}"), count(rows as u64));
        }
    }
    let lengths = format!(
        "{} to {} tokens, median {}, 95 % up to {}",
        data.report.shortest, data.report.longest, data.report.median, data.report.percentile_95
    );
    table.row("  lengths", lengths);
    table.row("  tokens", format!("{}, {} of them trained", count(tokens), count(trained_tokens)));
}
