//! `culvert preflight`: whether this node can have an agent, for people and for a Job.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Arg, ArgMatches, Command, value_parser};

use super::{
    print,
    sheet::{Column, Format, Row, Sheet},
};
use crate::{
    config,
    preflight::{self, Finding, Status, runtimes},
    source::kubernetes,
};

const COLUMNS: &[Column] = &[Column::new("CHECK"), Column::new("STATUS"), Column::new("FOUND"), Column::new("REMEDY")];
const OUTPUT: &str = "output";

/// The command, understood.
#[derive(Debug)]
pub struct Preflight {
    config: config::preflight::Config,
    output: Format,
}

/// The command line.
pub(super) fn command() -> Command {
    let output = Arg::new(OUTPUT)
        .short('o')
        .long(OUTPUT)
        .value_name("FORMAT")
        .value_parser(value_parser!(Format))
        .default_value("table")
        .help("How to show it");
    config::clap_command(
        "preflight",
        "Looks whether this node can have an agent, and says what to do where it cannot; status 1 if anything failed",
        config::preflight::SETTINGS,
    )
    .arg(output)
}

impl Preflight {
    /// From what was typed.
    ///
    /// # Errors
    /// Values that are wrong, all of them, one line each.
    pub(super) fn read(matches: &ArgMatches) -> anyhow::Result<Self> {
        let config = config::preflight::read(|name| matches.get_one::<String>(name).cloned())?;
        Ok(Self { config, output: matches.get_one(OUTPUT).copied().unwrap_or_default() })
    }

    /// Looks, and shows what was found on standard output; the status of the process says whether anything failed.
    ///
    /// # Errors
    /// It could not be shown.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut findings = preflight::look(&self.config.node);
        findings.extend(self.cluster()?);
        print(&sheet(&findings)?.show(self.output))?;
        let count = |status| findings.iter().filter(|finding| finding.status == status).count();
        let (ok, warned, failed) = (count(Status::Ok), count(Status::Warn), count(Status::Fail));
        eprintln!("{ok} ok, {warned} warnings, {failed} failed");
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// What the API server tells, if there is one.
    fn cluster(&self) -> anyhow::Result<Option<Finding>> {
        let Some(kubeconfig) = &self.config.cluster else { return Ok(None) };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("build the runtime")?;
        runtime.block_on(async {
            let client = kubernetes::client(kubeconfig.as_deref()).await?;
            Ok(Some(runtimes::look(&client).await))
        })
    }
}

fn sheet(findings: &[Finding]) -> anyhow::Result<Sheet> {
    let rows = findings.iter().map(|finding| {
        let status = match finding.status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        let cells = [finding.check, status, &finding.found, &finding.remedy].map(str::to_owned).to_vec();
        let object = serde_json::to_value(finding).context("write what was found as JSON")?;
        Ok(Row { key: finding.check.to_owned(), cells, object })
    });
    Ok(Sheet { columns: COLUMNS, rows: rows.collect::<anyhow::Result<_>>()? })
}
