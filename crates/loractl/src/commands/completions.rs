//! `loractl completions`: prints shell completion scripts.

use std::process::ExitCode;

use anyhow::Result;
use clap::Command;
use clap_complete::Shell;

use crate::output::line;

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  source <(loractl completions bash)
  loractl completions zsh > ~/.zfunc/_loractl
  loractl completions fish > ~/.config/fish/completions/loractl.fish")]
pub(crate) struct Args {
    /// Shell that will run the script.
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

pub(crate) fn execute(args: Args, mut cli: Command) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut cli, "loractl", &mut script);
    line(String::from_utf8(script)?.trim_end())?;
    Ok(ExitCode::SUCCESS)
}
