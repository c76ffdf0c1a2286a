//! The address of the coordinator.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use tonic::transport::Uri;

/// The environment variable with the address of the coordinator.
const VARIABLE: &str = "LORA_COORDINATOR_ADDR";
const DEFAULT: &str = "http://127.0.0.1:7400";
const DEFAULT_PORT: u16 = 7400;

/// The user's settings.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct UserConfig {
    coordinator: Option<String>,
}

/// Returns the coordinator's address: `given` on the command line, else that of the environment,
/// else that of the user's settings, else the default.
pub(crate) fn coordinator(given: Option<&str>) -> Result<String> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let variable = set(VARIABLE).map(|value| value.to_string_lossy().into_owned());
    let config_home = set("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let config_home = config_home.or_else(|| Some(PathBuf::from(set("HOME")?).join(".config")));
    resolve(given, variable.as_deref(), config_home.map(|dir| dir.join("loractl/config.toml")).as_deref())
}

fn resolve(given: Option<&str>, variable: Option<&str>, config: Option<&Path>) -> Result<String> {
    if let Some(text) = given {
        return normalized(text).context("--coordinator");
    }
    if let Some(text) = variable {
        return normalized(text).context(VARIABLE);
    }
    if let Some(path) = config
        && let Some(text) = read(path)?.coordinator
    {
        return normalized(&text).with_context(|| format!("{}: coordinator", path.display()));
    }
    Ok(DEFAULT.to_owned())
}

/// Reads the user's settings. A file that does not exist counts as empty.
fn read(path: &Path) -> Result<UserConfig> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    toml::from_str(&text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        anyhow!("{}:{line}: {}", path.display(), error.message())
    })
}

/// Returns an address as `http://host:port`. The scheme and the port of `text` are optional.
fn normalized(text: &str) -> Result<String> {
    let invalid = || format!("{text:?} is not an address; give http://host:port or host:port");
    let rest = match text.trim().split_once("://") {
        Some(("http", rest)) => rest,
        Some(("https", _)) => bail!("{text:?}: the coordinator does not support TLS; give http://host:port"),
        Some(_) => bail!(invalid()),
        None => text.trim(),
    };
    let uri: Uri =
        format!("http://{}", rest.trim_end_matches('/')).parse().map_err(|_| anyhow!(invalid()))?;
    let plain = uri.path() == "/" && uri.query().is_none();
    let (Some(host), true) = (uri.host().filter(|host| !host.is_empty()), plain) else { bail!(invalid()) };
    // The parser ignores a port that is not a number.
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    if authority.contains('@') || (uri.port_u16().is_none() && authority != host) {
        bail!(invalid());
    }
    Ok(format!("http://{host}:{}", uri.port_u16().unwrap_or(DEFAULT_PORT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheme_and_port_are_optional() {
        for (text, address) in [
            ("http://host:1", "http://host:1"),
            ("http://host:1/", "http://host:1"),
            ("host:1", "http://host:1"),
            ("10.0.0.7", "http://10.0.0.7:7400"),
            ("[::1]:9", "http://[::1]:9"),
            (" host ", "http://host:7400"),
        ] {
            assert_eq!(normalized(text).unwrap(), address, "{text}");
        }
    }

    #[test]
    fn invalid_addresses_are_rejected_with_an_example() {
        for text in
            ["", "http://", "ftp://host:1", "host:port", "host:99999", "host:1/path", "a b", "me@host:1"]
        {
            let error = normalized(text).unwrap_err().to_string();
            assert!(error.contains("http://host:port"), "{text}: {error}");
        }
        assert!(normalized("https://host:1").unwrap_err().to_string().contains("TLS"));
    }

    #[test]
    fn the_command_line_overrides_the_environment_and_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        assert_eq!(resolve(None, None, Some(&path)).unwrap(), DEFAULT);
        std::fs::write(&path, "coordinator = \"file:1\"\n").unwrap();
        assert_eq!(resolve(None, None, Some(&path)).unwrap(), "http://file:1");
        assert_eq!(resolve(None, Some("env:1"), Some(&path)).unwrap(), "http://env:1");
        assert_eq!(resolve(Some("flag:1"), Some("env:1"), Some(&path)).unwrap(), "http://flag:1");
    }

    #[test]
    fn errors_name_the_source_of_the_address() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "\ncoordinate = \"x\"\n").unwrap();
        let error = format!("{:#}", resolve(None, None, Some(&path)).unwrap_err());
        assert!(error.contains("config.toml:2:") && error.contains("`coordinator`"), "{error}");
        assert!(format!("{:#}", resolve(Some(""), None, None).unwrap_err()).starts_with("--coordinator: "));
        assert!(format!("{:#}", resolve(None, Some("x y"), None).unwrap_err()).starts_with(VARIABLE));
    }
}
