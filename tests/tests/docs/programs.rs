//! Command lines as the programs' help describes them.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::OnceLock;

use lora_e2e::{Finished, lora_coordinator, lora_worker, loractl, without_settings};

/// A command that runs the program of this name. `None` if the repository has no such program.
pub(crate) fn program(name: &str) -> Option<Command> {
    match name {
        "loractl" => Some(loractl()),
        "lora-coordinator" => Some(lora_coordinator()),
        "lora-worker" => Some(lora_worker()),
        _ => None,
    }
}

/// The help for a command line.
///
/// # Errors
/// The error of the program, which parses its arguments before it shows its help.
pub(crate) fn help(mut program: Command, arguments: &[String]) -> Result<Help, String> {
    let finished = Finished::run(without_settings(&mut program).args(arguments).arg("--help"));
    match finished.code {
        Some(0) => Ok(Help::parse(&finished.stdout)),
        _ => Err(finished.stderr.lines().next().unwrap_or_default().to_owned()),
    }
}

/// The flags of all commands of all programs.
pub(crate) fn flags() -> &'static BTreeSet<String> {
    static FLAGS: OnceLock<BTreeSet<String>> = OnceLock::new();
    FLAGS.get_or_init(|| {
        let mut flags = BTreeSet::new();
        for name in ["loractl", "lora-coordinator", "lora-worker"] {
            let top = help(program(name).unwrap(), &[]).unwrap();
            let commands = top.commands.iter().filter(|command| *command != "help");
            let of = |command| help(program(name).unwrap(), std::slice::from_ref(command)).unwrap();
            let below: Vec<Help> = commands.map(of).collect();
            flags.extend(
                [top].into_iter().chain(below).flat_map(|help| help.options).flat_map(|option| option.names),
            );
        }
        flags
    })
}

/// A parsed help text.
pub(crate) struct Help {
    options: Vec<HelpOption>,
    /// Required flags.
    required: Vec<String>,
    /// Number of required positional arguments.
    positionals: usize,
    /// Names of the subcommands.
    commands: Vec<String>,
}

struct HelpOption {
    /// Such as `-o` and `--output`.
    names: Vec<String>,
    takes_value: bool,
}

impl Help {
    fn parse(text: &str) -> Self {
        let options = text.lines().map(str::trim).filter(|line| line.starts_with('-')).map(|line| {
            let mut words = line.split_whitespace();
            let names = words.by_ref().take_while(|word| word.starts_with('-'));
            let names: Vec<String> = names.map(|word| word.trim_end_matches(',').to_owned()).collect();
            let takes_value =
                line.split_whitespace().nth(names.len()).is_some_and(|word| word.starts_with('<'));
            HelpOption { names, takes_value }
        });
        let options: Vec<HelpOption> = options.collect();
        let usage = text.lines().find_map(|line| line.strip_prefix("Usage: ")).unwrap_or_default();
        let (mut required, mut positionals) = (Vec::new(), 0);
        let mut words = usage.split_whitespace().peekable();
        while let Some(word) = words.next() {
            if word.starts_with("--") {
                required.push(word.to_owned());
                words.next_if(|value| value.starts_with('<'));
            } else if word.starts_with('<') && word != "<COMMAND>" {
                positionals += 1;
            }
        }
        let commands = text.lines().skip_while(|line| *line != "Commands:").skip(1);
        let commands = commands.take_while(|line| !line.trim().is_empty());
        let commands = commands.filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next());
        Self { options, required, positionals, commands: commands.map(str::to_owned).collect() }
    }

    /// The first required argument that is missing. `names` is the number of subcommand names among
    /// the arguments.
    pub(crate) fn missing(&self, arguments: &[String], names: usize) -> Option<String> {
        let option =
            |name: &str| self.options.iter().find(|option| option.names.iter().any(|known| known == name));
        let (mut given, mut positionals) = (BTreeSet::new(), 0);
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let (name, value) =
                word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
            match option(name) {
                Some(option) => {
                    given.extend(&option.names);
                    if option.takes_value && value.is_none() {
                        words.next();
                    }
                }
                None => positionals += 1,
            }
        }
        if let Some(flag) = self.required.iter().find(|flag| !given.contains(flag)) {
            return Some(format!("{flag} is missing"));
        }
        (positionals < self.positionals + names).then(|| "an argument is missing".to_owned())
    }
}
