// Pictures kept in this browser: IndexedDB, or memory where it has none.

const DATABASE = "latentrt";
const STORE = "pictures";

export class History {
  /** The pictures that are there, and where new ones go; `kept` is false if they will not survive a reload. */
  static async open() {
    try {
      return new History(await opened());
    } catch {
      return new History(null);
    }
  }

  constructor(database) {
    this.database = database;
  }

  get kept() {
    return this.database !== null;
  }

  /** All records, oldest first. */
  async all() {
    return this.kept ? this.#do("readonly", (store) => store.getAll()) : [];
  }

  async put(record) {
    if (this.kept) await this.#do("readwrite", (store) => store.put(record));
  }

  async remove(id) {
    if (this.kept) await this.#do("readwrite", (store) => store.delete(id));
  }

  async clear() {
    if (this.kept) await this.#do("readwrite", (store) => store.clear());
  }

  #do(mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(STORE, mode);
      const request = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error);
  });
}
