//! A table of names and values.

use std::fmt;

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
            // The further lines of a value are indented, so that they stay in its column.
            let value = value.replace('\n', &format!("\n{:width$}  ", ""));
            write!(f, "{name:width$}  {value}{end}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_aligned() {
        let mut table = Table::new();
        table.row("a", 1);
        table.row("long name", "x\ny");
        assert_eq!(table.to_string(), "a          1\nlong name  x\n           y");
    }
}
