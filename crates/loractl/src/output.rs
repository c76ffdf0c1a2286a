//! How results are written to stdout.

use std::fmt;

use clap::ValueEnum;

/// Form of a result on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Two aligned columns for people.
    Table,
    /// JSON for programs.
    Json,
}

/// Names and values in two aligned columns of plain text.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<(String, String)>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn row(&mut self, name: impl Into<String>, value: impl ToString) {
        self.rows.push((name.into(), value.to_string()));
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (i, (name, value)) in self.rows.iter().enumerate() {
            let end = if i + 1 < self.rows.len() { "\n" } else { "" };
            write!(f, "{name:width$}  {value}{end}")?;
        }
        Ok(())
    }
}

/// A number with its digits in groups of three.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let grouped: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|g| std::str::from_utf8(g).ok()).collect();
    grouped.join(",")
}

/// A size in the largest unit that it fills.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    UNITS
        .iter()
        .find(|(_, size)| n >= *size)
        .map_or_else(|| format!("{n} B"), |(unit, size)| format!("{:.2} {unit}", n as f64 / *size as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_sizes_have_units() {
        assert_eq!(
            ["0", "999", "1,000", "12,345,678"],
            [0, 999, 1000, 12_345_678].map(count).each_ref().map(|s| s.as_str())
        );
        assert_eq!(
            (bytes(1023), bytes(1536), bytes(3 << 30)),
            ("1023 B".into(), "1.50 KiB".into(), "3.00 GiB".into())
        );
    }

    #[test]
    fn values_are_aligned() {
        let mut table = Table::new();
        table.row("a", 1);
        table.row("long name", "x");
        assert_eq!(table.to_string(), "a          1\nlong name  x");
    }
}
