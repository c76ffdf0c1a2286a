//! Rows under column titles, no wider than the terminal.

use console::{Term, measure_text_width, truncate_str};

/// Smallest width that a column is cut to.
const MIN_COLUMN_WIDTH: usize = 6;
const COLUMN_GAP: &str = "  ";

/// How a column is fitted into the width of the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ColumnFit {
    /// Not cut by itself, because users copy its values. Only the end of a whole row may be cut.
    Whole,
    /// Cut, with `…`, if the rows would be too wide.
    Cut,
    /// Like `Whole`, but aligned to the right.
    Right,
}

/// Rows of text in aligned columns.
#[derive(Debug)]
pub(crate) struct Grid {
    columns: Vec<(&'static str, ColumnFit)>,
    rows: Vec<Vec<String>>,
}

impl Grid {
    /// Creates an empty grid with these columns.
    pub(crate) fn new(columns: &[(&'static str, ColumnFit)]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row with one value for each column. A control character, such as a line break,
    /// becomes a space.
    pub(crate) fn row(&mut self, values: Vec<String>) {
        debug_assert_eq!(values.len(), self.columns.len());
        let plain = |value: String| value.replace(char::is_control, " ");
        self.rows.push(values.into_iter().map(plain).collect());
    }

    /// The text of the grid. If stdout is a terminal, the text is at most as wide as the terminal.
    pub(crate) fn fitted(&self) -> String {
        let terminal = Term::stdout();
        let width = terminal.is_term().then(|| usize::from(terminal.size().1));
        self.text(width)
    }

    /// The text of the grid, at most `width` terminal columns wide.
    fn text(&self, width: Option<usize>) -> String {
        let titles: Vec<String> = self.columns.iter().map(|(title, _)| (*title).to_owned()).collect();
        let mut widths = vec![0; self.columns.len()];
        for row in std::iter::once(&titles).chain(&self.rows) {
            for (column, value) in widths.iter_mut().zip(row) {
                *column = measure_text_width(value).max(*column);
            }
        }
        if let Some(width) = width {
            self.shrink(&mut widths, width);
        }
        let lines = std::iter::once(&titles).chain(&self.rows).map(|row| {
            let line = self.line(row, &widths);
            width.map_or(line.clone(), |width| truncate_str(&line, width, "…").into_owned())
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Narrows the widest column that may be cut, again and again, until the rows fit or this
    /// column has its smallest width.
    fn shrink(&self, widths: &mut [usize], limit: usize) {
        let gaps = COLUMN_GAP.len() * widths.len().saturating_sub(1);
        while widths.iter().sum::<usize>() + gaps > limit {
            let cut = widths.iter_mut().zip(&self.columns).filter(|(_, (_, fit))| *fit == ColumnFit::Cut);
            match cut.map(|(width, _)| width).max().filter(|width| **width > MIN_COLUMN_WIDTH) {
                Some(widest) => *widest -= 1,
                None => return,
            }
        }
    }

    fn line(&self, row: &[String], widths: &[usize]) -> String {
        let mut line = String::new();
        for ((value, width), (_, fit)) in row.iter().zip(widths).zip(&self.columns) {
            if !line.is_empty() {
                line.push_str(COLUMN_GAP);
            }
            let value = truncate_str(value, *width, "…");
            let space = " ".repeat(width.saturating_sub(measure_text_width(&value)));
            line += &if *fit == ColumnFit::Right { space + &value } else { value.into_owned() + &space };
        }
        line.truncate(line.trim_end().len());
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Grid {
        let mut grid = Grid::new(&[
            ("JOB", ColumnFit::Whole),
            ("NAME", ColumnFit::Cut),
            ("STEP", ColumnFit::Right),
            ("INFO", ColumnFit::Cut),
        ]);
        grid.row(vec!["j1".into(), "a-name-of-some-length".into(), "7/100".into(), "two\nlines".into()]);
        grid.row(vec!["j22".into(), "日本語の名前".into(), "100/100".into(), String::new()]);
        grid
    }

    #[test]
    fn columns_with_wide_characters_are_aligned() {
        assert_eq!(
            grid().text(None),
            "JOB  NAME                      STEP  INFO\n\
             j1   a-name-of-some-length    7/100  two lines\n\
             j22  日本語の名前           100/100"
        );
    }

    #[test]
    fn the_widest_column_that_may_be_cut_is_cut_first() {
        assert_eq!(
            grid().text(Some(34)),
            "JOB  NAME          STEP  INFO\n\
             j1   a-name-o…    7/100  two lines\n\
             j22  日本語の…  100/100"
        );
        assert_eq!(
            grid().text(Some(28)),
            "JOB  NAME       STEP  INFO\n\
             j1   a-nam…    7/100  two l…\n\
             j22  日本…   100/100"
        );
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in 1..60 {
            for line in grid().text(Some(width)).lines() {
                assert!(measure_text_width(line) <= width, "{width}: {line:?}");
            }
        }
    }
}
