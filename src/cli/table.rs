//! Tables in Markdown, column by column.

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};

/// A table's columns, as they come: title, whether to the right, cells.
#[derive(Default)]
pub struct Columns(Vec<(String, bool, Vec<String>)>);

impl Columns {
    pub fn add<T>(&mut self, title: &str, right: bool, rows: &[T], of: impl Fn(&T) -> String) {
        self.0
            .push((title.to_owned(), right, rows.iter().map(of).collect()));
    }

    /// The table, without columns that are empty all the way down.
    pub fn table(mut self) -> Table {
        self.0
            .retain(|(_, _, cells)| cells.iter().any(|cell| !cell.is_empty()));
        let mut table = Table::new();
        table
            .load_preset(ASCII_MARKDOWN)
            .set_header(self.0.iter().map(|(title, ..)| title));
        let rows = self.0.first().map_or(0, |(_, _, cells)| cells.len());
        for row in 0..rows {
            table.add_row(self.0.iter().map(|(_, _, cells)| &cells[row]));
        }
        for (i, _) in self
            .0
            .iter()
            .enumerate()
            .filter(|(_, (_, right, _))| *right)
        {
            if let Some(column) = table.column_mut(i) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }
}
